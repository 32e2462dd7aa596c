"""Checks of the flags against each other and the model, before anything is allocated."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig

from corpus.manifest import MANIFEST_NAME
from engine.determinism import environment_problems
from engine.device import device_name, has_float8
from engine.job import ROWWISE, Compute, Job
from engine.launch import launch_problems
from engine.layout import layout_problems
from model_utils import mixed_length_problem
from planning.machines import DryRun, card_problems
from runtime import ranks
from runtime.console import InputError, below
from runtime.files import existing_part

if TYPE_CHECKING:  # benchmark.py imports no checkpointing
    from training.run import Outputs, Run

LARGEST_SEED = 2**32 - 1
NCCL_SECONDS = 600  # default_pg_nccl_timeout in torch.distributed.constants, which is None without CUDA


def check_job(
    job: Job, plan: DryRun, given: frozenset[str], mixed_lengths: bool = True, further: Sequence[str] = ()
) -> None:
    """Check the flags that all programs share, against each other and the model.

    Args:
        given: the flags with `action=Given` that are on the command line.
        mixed_lengths: True if a batch holds sequences of different lengths.
        further: problems of the program's own flags.

    Raises:
        InputError: with one line per problem.
    """
    config, asked = job.config, job.parallelism
    problems = [*further, *job.batch.problems(), *below(1, gpus=asked.gpus), *below(0, seed=job.seed)]
    problems += job.optimization.problems() + job.compute.problems(asked, config.num_hidden_layers)
    if job.seed > LARGEST_SEED:
        problems.append(f"--seed: must be at most {LARGEST_SEED}, not {job.seed}")
    if job.compute.deterministic:
        problems += environment_problems()
    problems += _length_problems(config, job.batch.max_length, mixed_lengths)
    problems += _plan_problems(plan, asked.gpus, job.compute)
    if problems := problems or job.problems():
        raise InputError(*problems)


def _length_problems(config: LlamaConfig, max_length: int, mixed_lengths: bool) -> list[str]:
    """Return a line if the model does not take sequences of this length."""
    context = config.max_position_embeddings
    if max_length > context:
        return [f"--max_length: {max_length} is above the model's context of {context} tokens; give at most that"]
    return list(filter(None, [mixed_length_problem(config, max_length)])) if mixed_lengths else []


def stage_problems(run: "Run", mixed_lengths: bool) -> list[str]:
    """Return a line for each thing in a stage's batch that model, layout or engine cannot take.

    Args:
        mixed_lengths: as in `check_job`, which has checked the run's own batch.
    """
    job, stages, problems = run.job, run.stages, list[str]()
    for number, stage in enumerate(stages.later, start=1):
        for line in _length_problems(job.config, stage.max_length or 0, mixed_lengths):
            problems.append(f"{stages.place(number, 'max_length')}: {line.removeprefix('--max_length: ')}")
    if problems:
        return problems
    first, *others = stages.batches(job.batch)
    for number, batch in enumerate(others, start=1):
        lines = layout_problems(job.with_layout(), batch, job.compute.mixed_precision, job.config)
        if batch.accumulation_steps > 1 and not job.accumulates:
            lines.append(
                f"--accumulation_steps: {batch.accumulation_steps} need sums of gradients from the start; give the run "
                "--accumulation_steps 2 or more, with a smaller -b"
            )
        if job.layout.plugin == "gemini_auto" and batch != replace(first, accumulation_steps=batch.accumulation_steps):
            lines.append("--max_length: gemini_auto plans its memory in the first step; give batches of one shape")
        for line in lines:
            key, _, problem = line.removeprefix("--").partition(": ")
            problems.append(f"{stages.place(number, key)}: {problem}")
    return problems


def _plan_problems(plan: DryRun, gpus: int | None, compute: Compute) -> list[str]:
    if plan.dry_run:
        return card_problems(plan, compute.fp8) + ranks.launch_problems()
    names = ("gpu", "gpu_memory", "gpus_per_node", "network", "facts", "mfu")
    flags = {"gpus": gpus, **{name: getattr(plan, name) for name in names}}
    problems = launch_problems() + [
        f"--{name}: takes effect only with --dry_run; give that too, or leave it out: a launcher sets the GPUs"
        for name, value in flags.items()
        if value is not None
    ]
    if compute.recipe == ROWWISE and compute.compile and not torch.cuda.is_available():  # torch 2.13
        problems.append("--compile: without a GPU torch compiles --fp8_recipe rowwise to NaN gradients; leave it out")
    if compute.fp8 and not problems and not has_float8():
        problems.append(f"--fp8: {device_name()} has no float8, which needs compute capability 8.9; leave --fp8 out")
    return problems


def run_problems(run: "Run", dataset: Path, cache_dir: Path) -> list[str]:
    """Return a line for each problem of the flags, other than the job's, that pretrain.py and finetune.py share.

    Args:
        dataset: the data's file or folder, which need not exist.
    """
    outputs = run.outputs
    return [
        *run.problems(),
        *folder_problems("--save_dir", outputs.save_dir),
        *folder_problems("--tensorboard_dir", outputs.tensorboard_dir),
        *_link_problems("--cache_dir", cache_dir),
        *outputs_among_data(outputs, dataset.resolve()),
        *_limit_problems(outputs.hang_timeout),
    ]


def _limit_problems(seconds: int | None) -> list[str]:
    """Return a line if torch, which names no rank, would end an exchange of GPUs before --hang_timeout."""
    if not torch.cuda.is_available() or (seconds or 0) < NCCL_SECONDS:
        return []
    return [f"--hang_timeout: must be below {NCCL_SECONDS} on GPUs, when torch ends an exchange, not {seconds}"]


def outputs_among_data(outputs: "Outputs", data: Path) -> list[str]:
    """Return a line for each output folder inside the data, since a resume would read its files as data."""
    if not data.is_dir() or (data / MANIFEST_NAME).exists():  # the manifest names the data files
        return []
    return [
        f"--{name}: {folder} lies in --dataset {data}, so its files would be read as data; give a folder outside"
        for name, folder in (("save_dir", outputs.save_dir), ("tensorboard_dir", outputs.tensorboard_dir))
        if folder.resolve().is_relative_to(data)
    ]


def folder_problems(flag: str, folder: Path) -> list[str]:
    """Return a line for a reason why the folder cannot be made or written to; do not make it."""
    if problems := _link_problems(flag, folder):
        return problems
    existing = existing_part(folder)
    if not existing.is_dir():
        return [f"{flag}: {existing} is a file; give a folder"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{flag}: no permission to write in {existing}; give another folder"]
    return []


def _link_problems(flag: str, folder: Path) -> list[str]:
    """Return a line for a broken link in the path of a folder, since no folder can be made in its place."""
    for path in (folder.absolute(), *folder.absolute().parents):
        if path.is_symlink() and not path.exists():
            return [f"{flag}: {path} is a broken link to {os.readlink(path)}; make that folder, or give another"]
    return []
