"""Pretrain a LLaMA model on text in RedPajama's format.

A laptop, without a GPU:
    python pretrain.py -c tiny -p zero2 -d data/ --tokenizer tokenizer/ -x fp32 -b 8 -l 256 -s 20
Eight GPUs of one machine:
    torchrun --standalone --nproc_per_node 8 pretrain.py -c 7b -p zero2 -x bf16 -a -g --accumulation_steps 64
Several machines:
    colossalai run --nproc_per_node 8 --hostfile hosts.txt pretrain.py -c 70b -p gemini -x bf16 -a -g
"""

from runtime import process, requirements

requirements.require()
requirements.start_cuda()

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from checkpointing.export import export_model
from checkpointing.folder import check_model
from checkpointing.pretrained import check_pretrained
from corpus.encoder import TextEncoder
from corpus.manifest import HELD_OUT
from corpus.prepare import is_prepared, prepare_dataset
from corpus.sources import REDPAJAMA_SAMPLE, Source, resolve_source
from corpus.tokenizer import check_vocabulary, load_tokenizer
from data_utils import MixtureDataset, PackedDataset, StreamedDataset
from engine.job import Job
from model_utils import MODEL_CONFIGS, load_config
from planning.machines import DryRun
from planning.memory import settle
from planning.report import say_host_memory, say_plan
from runtime.console import InputError, below, say
from runtime.ranks import once_per_node
from training.checks import check_job, outputs_among_data, run_problems
from training.flags import (
    ArgumentParser,
    DataSets,
    Given,
    add_evaluation_args,
    add_loading_args,
    add_plugin_args,
    add_source_args,
    add_tokenizer_arg,
    add_training_args,
    add_warmup_arg,
    job_of,
    parse_slice_weights,
    refuse_evaluation,
    run_of,
    short_name,
    take,
    user_name,
    user_path,
)
from training.plan import Run, announce, check_folders, complete, make_plan, resume_state, say_schedule
from training.session import execute
from training.tasks import check_tasks

COMMON_FLAGS = (  # --help lists them first
    *("--config", "--dataset", "--tokenizer", "--plugin", "--mixed_precision", "--batch_size", "--max_length", "--lr"),
    *("--max_steps", "--save_dir", "--save_interval", "--load"),
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(COMMON_FLAGS, prog="pretrain.py", description=__doc__)
    model = parser.add_argument_group("model and data")
    known = ", ".join(MODEL_CONFIGS)
    model.add_argument(
        "-c",
        "--config",
        type=user_name,
        default="7b",
        help=f"{known}, or a config.json or its folder (default: 7b)",
    )
    model.add_argument(
        "-d",
        "--dataset",
        type=user_name,
        default=REDPAJAMA_SAMPLE,
        nargs="+",
        action=DataSets,
        metavar="NAME[=WEIGHT]",
        help="hub name, or file or folder of JSONL (.gz, .zst), Parquet, or saved by `datasets`, with a column `text`, "
        "or a folder prepared by scripts/prepare_dataset.py; or several with weights that add up to 1, such as "
        f"web=0.7 code=0.3 (default: {REDPAJAMA_SAMPLE})",
    )
    add_source_args(model)
    add_tokenizer_arg(model)
    model.add_argument("--init_from", type=user_path, help="Hugging Face model folder with the initial weights")
    add_loading_args(model)
    model.add_argument(
        "--slice_weights",
        type=parse_slice_weights,
        metavar="llama|NAME=WEIGHT,...",
        help="draw from the slices in these proportions, or in LLaMA's (default: each sequence once per epoch)",
    )
    model.add_argument(
        "--streaming",
        action="store_true",
        help="read the data set during training, without preparing it; needs --max_steps (default: off)",
    )
    model.add_argument(
        "--shuffle_buffer",
        type=int,
        default=2048,
        action=Given,
        help="sequences of a stream that are shuffled together (default: 2048)",
    )
    model.add_argument(
        "--document_mask",
        action="store_true",
        help="keep attention inside a document, and restart positions with each (default: off, as in LLaMA)",
    )
    add_plugin_args(parser)
    add_training_args(parser)
    add_warmup_arg(parser)
    add_evaluation_args(parser)
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Data:
    """The text to train on, and the way it becomes sequences; the fields are the flags of their names."""

    dataset: str | dict[str, float]  # several: their weights
    dataset_revision: str | None
    dataset_slices: Sequence[str]
    cache_dir: Path
    eval_fraction: float | None
    streaming: bool
    shuffle_buffer: int
    slice_weights: dict[str, float] | None
    document_mask: bool
    given: frozenset[str]  # those with `action=Given` that are on the command line


def open_mixture(
    data: Data, tokenizer: PreTrainedTokenizerBase, job: Job
) -> tuple[MixtureDataset, dict[str, PackedDataset]]:
    """Return several data sets as one, and the held-out data of those that have some, by name."""
    assert isinstance(data.dataset, dict)
    parts, held_out, weights = {}, {}, {}
    for dataset, weight in data.dataset.items():
        own, its_held_out = open_data(replace(data, dataset=dataset, given=frozenset()), tokenizer, job)
        assert isinstance(own, PackedDataset)
        name = short_name(dataset)
        parts[name], weights[name] = own, weight
        if its_held_out:
            held_out[name] = its_held_out[""]
    if not held_out:
        refuse_evaluation(data.given, "give --eval_fraction")
    return MixtureDataset(parts, weights), held_out


def open_data(
    data: Data, tokenizer: PreTrainedTokenizerBase, job: Job
) -> tuple[PackedDataset | MixtureDataset | StreamedDataset, dict[str, PackedDataset]]:
    """Return the training data, and the held-out data by name: "" for those of one data set, if it has some."""
    if isinstance(data.dataset, dict):
        return open_mixture(data, tokenizer, job)
    name = data.dataset
    max_length = job.batch.max_length
    document_ends = (tokenizer.bos_token_id, tokenizer.eos_token_id) if data.document_mask else None
    weights = data.slice_weights
    choice: dict[str, Any] = {"revision": data.dataset_revision, "slices": data.dataset_slices}
    if data.streaming:
        if is_prepared(Path(name)):
            raise InputError(f"--streaming: {name} is already prepared; leave the flag out")
        source = Source.from_json(once_per_node(lambda: resolve_source(name, **choice).to_json()))
        if source.remark:
            say(source.remark)
        encoder = TextEncoder(tokenizer)
        stream = StreamedDataset(source, encoder, max_length, job.seed, data.shuffle_buffer, document_ends, weights)
        once_per_node(stream.check)
        return stream, {}
    if not data.eval_fraction and not is_prepared(Path(name)):
        refuse_evaluation(data.given, "give --eval_fraction")
    folder = prepare_dataset(name, tokenizer, data.cache_dir, eval_fraction=data.eval_fraction, **choice)
    dataset = PackedDataset(folder, max_length, document_ends, slice_weights=weights)
    if not dataset.manifest.get("eval_fraction"):
        refuse_evaluation(data.given, "prepare them with --eval_fraction")
        return dataset, {}
    return dataset, {"": PackedDataset(folder, max_length, document_ends, split=HELD_OUT)}


def check(args: argparse.Namespace, run: Run) -> None:
    """Check every flag before data or a GPU is touched. Raises InputError with one line per problem."""
    several = isinstance(args.dataset, dict)
    first, *others = map(Path, args.dataset if several else [args.dataset])
    problems = run_problems(run, first, args.cache_dir) + below(1, shuffle_buffer=args.shuffle_buffer)
    problems += [problem for other in others for problem in outputs_among_data(run.outputs, other.resolve())]
    flags = ("streaming", "slice_weights", "dataset_slices", "dataset_revision") if several else ()
    problems += [
        f"--{name}: takes one --dataset, not {len(args.dataset)}; leave it out, or prepare them with it beforehand"
        for name in flags
        if getattr(args, name)
    ]
    if args.eval_fraction is not None and not 0 <= args.eval_fraction < 1:
        problems.append(f"--eval_fraction: must be at least 0 and below 1, not {args.eval_fraction}")
    if args.streaming:
        if args.max_steps is None:
            problems.append("--streaming: a stream has no end; give --max_steps")
        if args.num_epochs > 1:
            problems.append("--num_epochs: a stream has no end, so it has no epochs; leave the flag out")
        given = args.given | ({"eval_fraction"} if args.eval_fraction else set())
        for name in ("eval_fraction", "eval_interval", "eval_first"):
            if name in given:
                problems.append(f"--{name}: a stream has no held-out documents; leave out this or --streaming")
    elif "shuffle_buffer" in args.given and not problems:
        problems.append("--shuffle_buffer: takes effect only with --streaming; give that too, or leave it out")
    if args.init_from and args.load not in (None, "latest"):
        problems.append("--init_from: starts a new run from a model's weights, --load resumes a run; give only one")
    check_job(run.job, take(DryRun, args), args.given, args.document_mask, problems)


def main() -> int:
    args = parse_args()

    # Find every mistake before a process group, a model or a GPU is touched.
    config = load_config(args.config)
    run = run_of(args, job_of(args, config), args.config)
    check(args, run)
    check_tasks(run.tasks, args.dry_run)
    tokenizer = load_tokenizer(args.tokenizer)
    check_vocabulary(tokenizer, config)
    pretrained = check_pretrained(args.init_from, config) if args.init_from else None
    state, checkpoint = resume_state(run.outputs)
    if checkpoint:
        check_model(checkpoint / "model", config, "--load")
    run, attention = complete(run, tokenizer, args.document_mask)
    if not args.dry_run:
        check_folders(run.outputs, run.job, state.step)
    dataset, held_out = open_data(take(Data, args), tokenizer, run.job)
    plan = make_plan(run, dataset, state)
    run = replace(run, job=settle(run.job, take(DryRun, args)))
    announce(run, dataset, plan, attention, on_gpu=args.dry_run or torch.cuda.is_available())
    for name, part in held_out.items():
        say(f"held out{f' of {name}' if name else ''}: {part.description}")
    if args.dry_run:
        say_plan(run.job, take(DryRun, args), plan.tokens_per_step, plan.remaining_tokens, run.num_workers)
        say_host_memory(run.job)
        say_schedule(plan, run.job.optimization.lr)
        return 0

    export = partial(export_model, tokenizer=tokenizer)
    return execute(run, plan, state, checkpoint, (dataset, held_out), pretrained, export)


if __name__ == "__main__":
    process.run(main, "pretrain.py")
