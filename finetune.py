"""Fine-tunes a LLaMA in Hugging Face's layout on prompts and their completions.

A laptop, without a GPU:
    python finetune.py --model_path model/ -d instructions.jsonl -p zero2 -x bf16 -b 8 -l 256 -e 10
Eight GPUs of one machine:
    torchrun --standalone --nproc_per_node 8 finetune.py --plugin hybrid_parallel --dataset yizhongw/self_instruct \\
        --model_path /path/llama --task_name super_natural_instructions --save_dir /path/output
"""

import console
import dependencies

console.quiet_third_parties()
dependencies.require()
dependencies.start_cuda()

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import LlamaConfig, PreTrainedTokenizerBase

import checkpoint_utils
import model_export
import run_plan
import sharded_state
import train_utils
from arguments import (
    ArgumentParser,
    add_evaluation_args,
    add_loading_args,
    add_training_args,
    refuse_interval,
    user_name,
    validate_args,
)
from attn import select_attention
from booster_utils import DTYPES, boost, build_plugin, launch, shut_down
from checkpoint_utils import LazyTensors
from console import InputError, say
from dataset_choice import NotFound
from dataset_sources import Source, resolve_source
from dry_run import say_plan
from evaluation import evaluation_loader
from instruction_data import InstructionDataset, prepare_examples
from instruction_rows import ExampleEncoder, find_shape
from layout import Layout, add_plugin_args, resolve_layout
from lora import add_lora_args, fill_lora_args, lora_config, lora_problems
from memory_estimate import settle_recomputation
from model_utils import load_config
from pretrained import (
    check_pretrained,
    find_model,
    generation_config,
    load_pretrained,
    refuse_other_formats,
    weights_fingerprint,
)
from ranks import once_per_node
from tokenization import check_vocabulary, load_tokenizer

DATASET, TASK = "yizhongw/self_instruct", "super_natural_instructions"
MAX_LENGTH = 4096


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="finetune.py", description=__doc__)
    model = parser.add_argument_group("model and data")
    model.add_argument(
        "--model_path", type=user_name, required=True, help="model folder in Hugging Face's layout, or a hub name"
    )
    model.add_argument(
        "-d",
        "--dataset",
        type=user_name,
        default=DATASET,
        help="hub name, or file or folder of JSONL (.gz, .zst), Parquet, or saved by `datasets`, with the columns "
        f"prompt and completion, instruction (input) and output, or messages (default: {DATASET})",
    )
    model.add_argument("--task_name", help=f"configuration of the data set (default: {TASK})")
    model.add_argument("--tokenizer", type=user_name, help="hub name or folder (default: the model's own)")
    model.add_argument("--train_on_prompt", action="store_true", help="learn the prompt too (default: off)")
    model.add_argument(
        "--pack", action="store_true", help="several examples a sequence, each attending to itself alone (default: off)"
    )
    add_loading_args(model)
    add_plugin_args(parser)
    add_training_args(parser)
    add_evaluation_args(parser, by_fraction=False)
    add_lora_args(parser)
    parser.set_defaults(max_length=None, warmup_steps=None, warmup_steps_given=False)
    return parser.parse_args(arguments)


def find_source(args: argparse.Namespace, split: str) -> Source:
    """Find the files of a split of --dataset, of its configuration --task_name."""
    default = TASK if args.dataset == DATASET and not Path(args.dataset).exists() else None
    return resolve_source(
        args.dataset,
        configuration=args.task_name or default,
        split=split,
        used=("train", "test"),
        flag="--task_name",
    )


def find_test_source(args: argparse.Namespace, train: Source) -> Source | None:
    """Find the files of the split `test`, where the data set has one that is not trained on.

    Raises:
        InputError: the split is there, but cannot be read.
    """
    if Path(args.dataset).expanduser().is_file():
        return None
    try:
        test = replace(find_source(args, "test"), remark="")  # the other split has said what is left out
    except NotFound:
        return None
    return None if set(test.files) & set(train.files) else test


def open_data(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, layout: Layout
) -> tuple[InstructionDataset, InstructionDataset | None]:
    """The data to train on, and those of the split `test` if there is one.

    One rank of a node finds and prepares them, while the others wait.
    """

    def prepare() -> list[str]:
        folders, train = [], find_source(args, "train")
        for source in filter(None, (train, find_test_source(args, train))):
            encoder = ExampleEncoder(tokenizer, find_shape(source, tokenizer), args.max_length, args.train_on_prompt)
            folders.append(str(prepare_examples(source, encoder, args.cache_dir)))
        return folders

    dataset, *held_out = (InstructionDataset(Path(folder), args.pack, layout.sp) for folder in once_per_node(prepare))
    if not held_out:
        refuse_interval(args, "give a data set with a split `test`")
    return dataset, held_out[0] if held_out else None


def export_final(
    args: argparse.Namespace,
    config: LlamaConfig,
    weights: LazyTensors,
    tokenizer: PreTrainedTokenizerBase,
    documents: dict[str, dict],
    checkpoint: Path,
) -> None:
    """Makes the folder `final` of a checkpoint, its adapters merged into the weights that they were trained beside."""
    target = args.save_dir / "final"
    if args.lora_rank:
        model_export.export_merged(checkpoint, target, tokenizer, config, weights, documents)
    else:
        model_export.export(checkpoint, target, tokenizer, documents=documents)


def main() -> int:
    args = parse_args()

    # Everything that can be wrong is found here, before a process group, a model or a GPU is touched.
    folder = find_model(args.model_path, "--model_path")
    refuse_other_formats(folder, "--model_path")
    config = load_config(str(folder), "--model_path")
    if args.max_length is None:
        args.max_length = min(MAX_LENGTH, config.max_position_embeddings)
    if args.lora_rank:
        fill_lora_args(args)
    validate_args(args, config)
    layout = resolve_layout(args, config)
    if problems := lora_problems(args, layout):
        raise InputError(*problems)
    tokenizer = load_tokenizer(args.tokenizer or str(folder))
    check_vocabulary(tokenizer, config)
    weights = check_pretrained(folder, config, "--model_path")
    documents = generation_config(folder, tokenizer, "--model_path")
    if args.lora_rank:
        args.base_weights = once_per_node(lambda: weights_fingerprint(weights))
    state, checkpoint = run_plan.resume_state(args)
    if checkpoint:
        checkpoint_utils.check_model(checkpoint / "model", config, "--load")
    if args.lora_rank:
        config.lora = lora_config(args)
    config.torch_dtype = DTYPES[args.mixed_precision]
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    run_plan.check_folders(args, config)
    dataset, held_out = open_data(args, tokenizer, layout)
    plan = run_plan.make_plan(args, layout, dataset, state)
    attention = select_attention(config, args.flash_attention, layout.sp > 1, args.pack)
    settle_recomputation(args, config, layout)
    run_plan.announce(args, config, dataset, plan, attention)
    if held_out:
        say(f"evaluation every {args.eval_interval:,} steps: {held_out.description}")
    if args.dry_run:
        if not args.pack:
            args.max_length = dataset.longest
        say_plan(args, config, layout, plan.tokens_per_step, plan.remaining_tokens)
        return 0

    run_plan.claim_folders(args, state, checkpoint)
    export = partial(export_final, args, config, weights, tokenizer, documents)
    launch(args.seed)
    run_plan.check_agreement(args, state, checkpoint)
    if train_utils.nothing_left(args, state, plan, checkpoint, export):
        return 0
    plugin = build_plugin(args, layout, config, length_varies=True)
    booster, model, optimizer = boost(args, config, plugin)
    lr_scheduler = train_utils.build_scheduler(optimizer, args, state, plan)
    if args.lora_rank or not checkpoint:
        load_pretrained(weights, plugin, model, optimizer, "--model_path")
        say(f"initial weights: {folder}")
    if checkpoint:
        checkpoint_utils.load(checkpoint, plugin, model, optimizer, config)
        say(f"resumed: {checkpoint}, {state.tokens:,} tokens trained")
    elif args.lora_rank:
        sharded_state.initialize(plugin, model, optimizer, config, args.seed)
    loader = train_utils.build_dataloader(plugin, dataset, args, state, plan)
    evaluation = evaluation_loader(plugin, held_out, layout, args) if held_out else None

    checkpoint, interrupted = train_utils.train(
        args, config, booster, model, optimizer, lr_scheduler, loader, state, plan, checkpoint, evaluation
    )

    status = train_utils.conclude(args, checkpoint, export, interrupted)
    shut_down(plugin)
    return status


if __name__ == "__main__":
    console.run(main, "finetune.py")
