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
from corpus.manifest import HELD_OUT, read_manifest
from corpus.prepare import is_prepared, prepare_dataset
from corpus.sources import REDPAJAMA_SAMPLE, Source, resolve_source
from corpus.tokenizer import check_same_ids, check_vocabulary, load_tokenizer
from data_utils import MixtureDataset, PackedDataset, StreamedDataset, TrainingData
from engine.job import Job
from model_utils import MODEL_CONFIGS, load_config
from planning.machines import DryRun
from planning.memory import settle
from planning.report import say_host_memory, say_memory, say_time
from runtime.console import InputError, below, say
from runtime.ranks import once_per_node
from training.announcements import announce, say_schedule
from training.checks import check_job, outputs_among_data, run_problems, stage_problems
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
    take,
    user_name,
    user_path,
)
from training.folders import check_folders, resume_state
from training.legs import largest_job
from training.plan import make_plan
from training.run import Run, complete
from training.session import execute
from training.stages import Stages, read_stages, short_name
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
    model.add_argument(
        "--stages",
        type=user_path,
        metavar="FILE",
        help="TOML file with other data, sequence length or learning rate from given tokens on (default: none)",
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

    @property
    def choice(self) -> dict[str, Any]:
        """The part of a data set to read."""
        return {"revision": self.dataset_revision, "slices": self.dataset_slices}

    def document_ends(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
        """Return the tokens that keep documents apart, if they are kept apart."""
        return (tokenizer.bos_token_id, tokenizer.eos_token_id) if self.document_mask else None

    def prepare(self, name: str, tokenizer: PreTrainedTokenizerBase) -> Path:
        """Return the folder with the tokens of a data set."""
        return prepare_dataset(name, tokenizer, self.cache_dir, eval_fraction=self.eval_fraction, **self.choice)

    def packed(self, name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PackedDataset:
        """Return the training data in the prepared folder of a data set."""
        ends = self.document_ends(tokenizer)
        return PackedDataset(folder, max_length, ends, slice_weights=self.slice_weights, name=name)

    def held_out(
        self, name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> PackedDataset | None:
        """Return the held-out data in the prepared folder of a data set; None if it has none."""
        if not read_manifest(folder).get("eval_fraction"):
            return None
        return PackedDataset(folder, max_length, self.document_ends(tokenizer), split=HELD_OUT, name=name)


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
    if data.streaming:
        if is_prepared(Path(name)):
            raise InputError(f"--streaming: {name} is already prepared; leave the flag out")
        source = Source.from_json(once_per_node(lambda: resolve_source(name, **data.choice).to_json()))
        if source.remark:
            say(source.remark)
        encoder = TextEncoder(tokenizer)
        ends, weights = data.document_ends(tokenizer), data.slice_weights
        stream = StreamedDataset(source, encoder, max_length, job.seed, data.shuffle_buffer, ends, weights)
        once_per_node(stream.check)
        return stream, {}
    if not data.eval_fraction and not is_prepared(Path(name)):
        refuse_evaluation(data.given, "give --eval_fraction")
    folder = data.prepare(name, tokenizer)
    dataset = data.packed(name, folder, tokenizer, max_length)
    if (held_out := data.held_out(name, folder, tokenizer, max_length)) is None:
        refuse_evaluation(data.given, "prepare them with --eval_fraction")
        return dataset, {}
    return dataset, {"": held_out}


def open_stages(
    data: Data, stages: Stages, tokenizer: PreTrainedTokenizerBase, job: Job
) -> tuple[list[TrainingData], list[dict[str, PackedDataset]]]:
    """Return the training data of each stage, and, in its length, the held-out data of the data sets of all by name."""
    first, its_held_out = open_data(replace(data, given=frozenset()) if stages.later else data, tokenizer, job)
    if not stages.later:
        return [first], [its_held_out]
    alone = short_name(data.dataset) if isinstance(data.dataset, str) else None
    if isinstance(first, MixtureDataset):
        weights, folders = first.weights, {name: part.folder for name, part in first.parts.items()}
    else:
        assert alone is not None
        assert isinstance(first, PackedDataset)
        weights, folders = {alone: 1.0}, {alone: first.folder}
    paths = [data.dataset] if isinstance(data.dataset, str) else [*data.dataset]
    written = {short_name(path): path for path in paths}
    for number, stage in enumerate(stages.later, start=1):
        for path in stage.data or ():
            written.setdefault(short_name(path), path)
            if short_name(path) not in folders:
                with stages.errors(number, "data"):
                    folders[short_name(path)] = data.prepare(path, tokenizer)
    datasets: list[TrainingData] = [first]
    lengths = [batch.max_length for batch in stages.batches(job.batch)]
    for number, (stage, length) in enumerate(zip(stages.later, lengths[1:], strict=True), start=1):
        weights = {short_name(path): weight for path, weight in (stage.data or {}).items()} or weights
        with stages.errors(number, "max_length"):
            parts = {name: data.packed(written[name], folders[name], tokenizer, length) for name in weights}
        datasets.append(MixtureDataset(parts, weights, alone))
    held_out = [open_held_out(data, folders, tokenizer, length) for length in lengths]
    if not any(held_out):
        refuse_evaluation(data.given, "give --eval_fraction")
    return datasets, held_out


def open_held_out(
    data: Data, folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, PackedDataset]:
    """Return the held-out data of data sets in sequences of a length, without those that have too few for one."""
    opened = {}
    for name, folder in folders.items():
        try:
            part = data.held_out(name, folder, tokenizer, max_length)
        except InputError as error:
            (problem,) = error.problems
            say(f"held out of {name}: left out of evaluations on {max_length} tokens: {problem}")
        else:
            opened |= {name: part} if part else {}
    return opened


def check(args: argparse.Namespace, run: Run) -> None:
    """Check every flag before data or a GPU is touched. Raises InputError with one line per problem."""
    several = isinstance(args.dataset, dict)
    names = list(args.dataset) if several else [args.dataset]
    first, *others = map(Path, [*names, *(name for stage in run.stages.later for name in stage.data or ())])
    problems = run_problems(run, first, args.cache_dir) + below(1, shuffle_buffer=args.shuffle_buffer)
    problems += [problem for other in others for problem in outputs_among_data(run.outputs, other.resolve())]
    flags = ("streaming", "slice_weights", "dataset_slices", "dataset_revision")
    count = len(args.dataset) if several else "--stages"
    problems += [
        f"--{name}: takes one --dataset, not {count}; leave it out, or prepare them with it beforehand"
        for name in flags
        if getattr(args, name) and (several or run.stages.later)
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
    if problems := stage_problems(run, args.document_mask):
        raise InputError(*problems)


def main() -> int:
    args = parse_args()

    # Find every mistake before a process group, a model or a GPU is touched.
    config = load_config(args.config)
    stages = read_stages(args.stages, args.dataset) if args.stages else None
    run = run_of(args, job_of(args, config), args.config, stages=stages)
    check(args, run)
    check_tasks(run.tasks, args.dry_run)
    tokenizer = load_tokenizer(args.tokenizer)
    check_vocabulary(tokenizer, config)
    pretrained = check_pretrained(args.init_from, config) if args.init_from else None
    if args.init_from:
        check_same_ids(tokenizer, args.init_from, "--init_from")
    state, checkpoint = resume_state(run.outputs)
    if checkpoint:
        check_model(checkpoint / "model", config, "--load")
    run, attention = complete(run, tokenizer, args.document_mask)
    if not args.dry_run:
        check_folders(run.outputs, run.job, state.step)
    datasets, held_out = open_stages(take(Data, args), run.stages, tokenizer, run.job)
    plan = make_plan(run, datasets, state)
    largest = settle(largest_job(run), take(DryRun, args))  # of the stages
    run = replace(run, job=replace(run.job, compute=largest.compute, exchange=largest.exchange))
    announce(run, plan, attention, on_gpu=args.dry_run or torch.cuda.is_available())
    for name, part in held_out[plan.legs[0].number].items():
        say(f"held out{f' of {name}' if name else ''}: {part.description}")
    if args.dry_run:
        dry_run = take(DryRun, args)
        if run.stages.later:
            say(f"memory of the stage that takes most, with sequences of {largest.batch.max_length} tokens:")
        say_memory(largest, dry_run)
        for leg in plan.legs:
            if run.stages.later:
                say(f"time of stage {leg.number}:")
            job = replace(run.job, parallelism=run.job.with_layout(), batch=leg.batch)
            say_time(job, dry_run, leg.tokens_per_step, leg.steps * leg.tokens_per_step, max(1, run.num_workers))
        say_host_memory(run.job)
        say_schedule(plan, run.job.optimization.lr)
        return 0

    export = partial(export_model, tokenizer=tokenizer)
    return execute(run, plan, state, checkpoint, (datasets, held_out), pretrained, export)


if __name__ == "__main__":
    process.run(main, "pretrain.py")
