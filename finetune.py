"""Fine-tunes a LLaMA in Hugging Face's layout on prompts and their completions.

A laptop, without a GPU:
    python finetune.py --model_path model/ -d instructions.jsonl -p zero2 -x bf16 -b 8 -l 256 -e 10
Eight GPUs of one machine:
    torchrun --standalone --nproc_per_node 8 finetune.py --plugin hybrid_parallel --dataset yizhongw/self_instruct \\
        --model_path /path/llama --task_name super_natural_instructions --save_dir /path/output
"""

from runtime import process, requirements

requirements.require()
requirements.start_cuda()

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import LlamaConfig, PreTrainedTokenizerBase

from attn import select_attention
from checkpointing.adapters import fill_lora_args, lora_config, lora_problems
from checkpointing.export import export_merged, export_model
from checkpointing.folder import check_model
from checkpointing.pretrained import (
    check_pretrained,
    find_model,
    generation_config,
    load_pretrained,
    refuse_other_formats,
    weights_fingerprint,
)
from checkpointing.reader import LazyTensors, load_checkpoint
from corpus.examples import prepare_examples
from corpus.instructions import ExampleEncoder, find_shape
from corpus.sources import Source, resolve_source
from corpus.splits import NotFound
from corpus.tokenizer import check_vocabulary, load_tokenizer
from data_utils import InstructionDataset
from engine.boost import DTYPES, boost, build_plugin
from engine.launch import launch, shut_down
from engine.layout import Layout, resolve_layout
from engine.shards import initialize_weights
from model_utils import load_config
from planning.memory import settle_recomputation
from planning.report import say_plan
from runtime.console import InputError, say
from runtime.ranks import once_per_node
from training.batches import build_dataloader
from training.checks import validate_args
from training.evaluation import evaluation_loader
from training.flags import (
    ArgumentParser,
    add_evaluation_args,
    add_loading_args,
    add_lora_args,
    add_plugin_args,
    add_training_args,
    refuse_interval,
    user_name,
)
from training.loop import conclude, nothing_left, train
from training.plan import announce, check_agreement, check_folders, claim_folders, make_plan, resume_state
from training.schedule import build_scheduler

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
        export_merged(checkpoint, target, tokenizer, config, weights, documents)
    else:
        export_model(checkpoint, target, tokenizer, documents=documents)


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
    state, checkpoint = resume_state(args)
    if checkpoint:
        check_model(checkpoint / "model", config, "--load")
    if args.lora_rank:
        config.lora = lora_config(args)
    config.torch_dtype = DTYPES[args.mixed_precision]
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    check_folders(args, config)
    dataset, held_out = open_data(args, tokenizer, layout)
    plan = make_plan(args, layout, dataset, state)
    attention = select_attention(config, args.flash_attention, layout.sp > 1, args.pack)
    settle_recomputation(args, config, layout)
    announce(args, config, dataset, plan, attention)
    if held_out:
        say(f"evaluation every {args.eval_interval:,} steps: {held_out.description}")
    if args.dry_run:
        if not args.pack:
            args.max_length = dataset.longest
        say_plan(args, config, layout, plan.tokens_per_step, plan.remaining_tokens)
        return 0

    claim_folders(args, state, checkpoint)
    export = partial(export_final, args, config, weights, tokenizer, documents)
    launch(args.seed)
    check_agreement(args, state, checkpoint)
    if nothing_left(args, state, plan, checkpoint, export):
        return 0
    plugin = build_plugin(args, layout, config, length_varies=True)
    booster, model, optimizer = boost(args, config, plugin)
    lr_scheduler = build_scheduler(optimizer, args, state, plan)
    if args.lora_rank or not checkpoint:
        load_pretrained(weights, plugin, model, optimizer, "--model_path")
        say(f"initial weights: {folder}")
    if checkpoint:
        load_checkpoint(checkpoint, plugin, model, optimizer, config)
        say(f"resumed: {checkpoint}, {state.tokens:,} tokens trained")
    elif args.lora_rank:
        initialize_weights(plugin, model, optimizer, config, args.seed)
    loader = build_dataloader(plugin, dataset, args, state, plan)
    evaluation = evaluation_loader(plugin, held_out, layout, args) if held_out else None

    checkpoint, interrupted = train(
        args, config, booster, model, optimizer, lr_scheduler, loader, state, plan, checkpoint, evaluation
    )

    status = conclude(args, checkpoint, export, interrupted)
    shut_down(plugin)
    return status


if __name__ == "__main__":
    process.run(main, "finetune.py")
