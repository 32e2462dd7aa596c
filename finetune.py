"""Fine-tune a LLaMA model in Hugging Face's format on prompts and completions.

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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, PreTrainedTokenizerBase

from checkpointing.adapters import Lora
from checkpointing.export import export_merged, export_model
from checkpointing.folder import check_model
from checkpointing.pretrained import (
    check_pretrained,
    find_model,
    generation_config,
    refuse_other_formats,
    weights_fingerprint,
)
from corpus.examples import prepare_examples
from corpus.instructions import ExampleEncoder, find_shape
from corpus.sources import Source, resolve_source
from corpus.splits import NotFound
from corpus.tokenizer import check_same_ids, check_vocabulary, load_tokenizer
from data_utils import InstructionDataset
from engine.job import Job
from model_utils import load_config
from planning.machines import DryRun
from planning.memory import settle
from planning.report import say_host_memory, say_plan
from runtime.console import InputError, say
from runtime.ranks import once_per_node
from training.announcements import announce, say_schedule
from training.checks import check_job, run_problems
from training.flags import (
    ArgumentParser,
    add_evaluation_args,
    add_loading_args,
    add_lora_args,
    add_plugin_args,
    add_training_args,
    job_of,
    refuse_evaluation,
    run_of,
    take,
    user_name,
)
from training.folders import check_folders, resume_state
from training.plan import make_plan
from training.run import Run, complete
from training.session import execute
from training.tasks import check_tasks

DATASET, TASK = "yizhongw/self_instruct", "super_natural_instructions"
MAX_LENGTH = 4096


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="finetune.py", description=__doc__)
    model = parser.add_argument_group("model and data")
    model.add_argument("--model_path", type=user_name, required=True, help="Hugging Face model folder, or hub name")
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
    model.add_argument("--train_on_prompt", action="store_true", help="also learn the prompt (default: off)")
    model.add_argument(
        "--pack",
        action="store_true",
        help="several examples per sequence, each attending to itself only (default: off)",
    )
    add_loading_args(model)
    add_plugin_args(parser)
    add_training_args(parser)
    add_evaluation_args(parser, by_fraction=False)
    add_lora_args(parser)
    parser.set_defaults(max_length=None)
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Data:
    """The examples to train on, and the way they become sequences; the fields are the flags of their names."""

    dataset: str
    task_name: str | None
    cache_dir: Path
    train_on_prompt: bool
    pack: bool
    given: frozenset[str]  # those with `action=Given` that are on the command line


def find_source(data: Data, split: str) -> Source:
    """Find the files of a split of the data set, in the configuration `task_name`."""
    default = TASK if data.dataset == DATASET and not Path(data.dataset).exists() else None
    return resolve_source(
        data.dataset,
        configuration=data.task_name or default,
        split=split,
        used=("train", "test"),
        flag="--task_name",
    )


def find_test_source(data: Data, train: Source) -> Source | None:
    """Find the files of the split `test`; None if there is no such split or it is the training data.

    Raises:
        InputError: the split exists but cannot be read.
    """
    if Path(data.dataset).expanduser().is_file():
        return None
    try:
        test = replace(find_source(data, "test"), remark="")  # already printed for the training split
    except NotFound:
        return None
    return None if set(test.files) & set(train.files) else test


def finetuning_job(args: argparse.Namespace, config: LlamaConfig, lora: Lora) -> Job:
    """Return the job; the default length is at most the model's context, and adapters default to tp 1 and pp 1."""
    job = replace(job_of(args, config), length_varies=True, adapters=lora.config(args.model_path))
    if args.max_length is None:
        max_length = min(MAX_LENGTH, config.max_position_embeddings)
        job = replace(job, batch=replace(job.batch, max_length=max_length))
    if job.adapters and args.plugin == "hybrid_parallel":  # it cannot split adapters
        asked = job.parallelism
        job = replace(job, parallelism=replace(asked, tp=asked.tp or 1, pp=asked.pp or 1))
    return job


def open_data(
    data: Data, tokenizer: PreTrainedTokenizerBase, job: Job
) -> tuple[InstructionDataset, InstructionDataset | None]:
    """Return the training data, and the split `test` or None.

    One rank per node finds and prepares them while the others wait.
    """

    def prepare() -> list[str]:
        folders, train = [], find_source(data, "train")
        for source in filter(None, (train, find_test_source(data, train))):
            encoder = ExampleEncoder(
                tokenizer, find_shape(source, tokenizer), job.batch.max_length, data.train_on_prompt
            )
            folders.append(str(prepare_examples(source, encoder, data.cache_dir)))
        return folders

    dataset, *held_out = (
        InstructionDataset(Path(folder), data.pack, job.layout.sp) for folder in once_per_node(prepare)
    )
    if not held_out:
        refuse_evaluation(data.given, "give a data set with a split `test`")
    return dataset, held_out[0] if held_out else None


def check(args: argparse.Namespace, run: Run) -> None:
    """Check every flag before data or a GPU is touched. Raises InputError with one line per problem."""
    data = Path(args.dataset, args.task_name or "")
    check_job(run.job, take(DryRun, args), args.given, further=run_problems(run, data, args.cache_dir))
    if run.lora and (problems := run.lora.problems(run.job.layout)):
        raise InputError(*problems)


def main() -> int:
    args = parse_args()

    # Find every mistake before a process group, a model or a GPU is touched.
    folder = find_model(args.model_path, "--model_path")
    refuse_other_formats(folder, "--model_path")
    config, lora = load_config(str(folder), "--model_path"), take(Lora, args)
    run = run_of(args, finetuning_job(args, config, lora), args.model_path, lora)
    run = replace(run, tasks=replace(run.tasks, tokenizer=args.tokenizer or str(folder)))
    check(args, run)
    check_tasks(run.tasks, args.dry_run)
    tokenizer = load_tokenizer(args.tokenizer or str(folder))
    check_vocabulary(tokenizer, config)
    if args.tokenizer:
        check_same_ids(tokenizer, folder, "--model_path")
    pretrained = check_pretrained(folder, config, "--model_path")
    json_files = generation_config(folder, tokenizer, "--model_path")
    if run.job.adapters:
        fingerprint = once_per_node(lambda: weights_fingerprint(pretrained))
        run = replace(run, lora=replace(lora, base_weights=fingerprint))
    state, checkpoint = resume_state(run.outputs)
    if checkpoint:
        check_model(checkpoint / "model", config, "--load")
    run, attention = complete(run, tokenizer, args.pack)
    if not args.dry_run:
        check_folders(run.outputs, run.job, state.step)
    dataset, held_out = open_data(take(Data, args), tokenizer, run.job)
    plan = make_plan(run, [dataset], state)
    run = replace(run, job=settle(run.job, take(DryRun, args)))
    announce(run, plan, attention, on_gpu=args.dry_run or torch.cuda.is_available())
    if held_out:
        say(f"evaluation every {args.eval_interval:,} steps: {held_out.description}")
    if args.dry_run:
        longest = run.job.batch.max_length if args.pack else dataset.longest
        job = replace(run.job, batch=replace(run.job.batch, max_length=longest))
        say_plan(job, take(DryRun, args), plan.tokens_per_step, plan.remaining_tokens, max(1, run.num_workers))
        say_host_memory(job)
        say_schedule(plan, run.job.optimization.lr)
        return 0

    export = partial(export_model, tokenizer=tokenizer, json_files=json_files)
    if run.job.adapters:
        export = partial(
            export_merged, tokenizer=tokenizer, config=run.job.config, weights=pretrained, json_files=json_files
        )
    data = [dataset], [{"": held_out} if held_out else {}]
    return execute(run, plan, state, checkpoint, data, pretrained, export)


if __name__ == "__main__":
    process.run(main, "finetune.py")
