"""Validation of the flags against one another and the model, before anything is allocated."""

import argparse
import math
import os
from pathlib import Path

from transformers import LlamaConfig

from corpus.manifest import MANIFEST_NAME
from engine.launch import launch_problems
from engine.layout import layout_problems
from engine.recomputation import AUTO, recomputed_layers, recomputed_share, reenters
from model_utils import mixed_length_problem
from planning.cards import card_problems
from runtime import ranks
from runtime.console import InputError
from runtime.files import existing_part


def validate_args(args: argparse.Namespace, config: LlamaConfig) -> None:
    """Checks the flags that the program has against one another and the model, before anything is allocated.

    Raises:
        InputError: with one line for every problem found.
    """
    problems = []
    for name, least in (
        ("num_epochs", 1),
        ("batch_size", 1),
        ("accumulation_steps", 1),
        ("max_length", 2),
        ("max_steps", 1),
        ("save_interval", 1),
        ("keep_checkpoints", 1),
        ("keep_every", 1),
        ("log_interval", 1),
        ("eval_interval", 1),
        ("shuffle_buffer", 1),
        ("warmup_steps", 0),
        ("num_workers", 0),
        ("num_steps", 1),
        ("ignore_steps", 0),
        ("memory_limit", 1),
        ("gpus", 1),
        ("seed", 0),
    ):
        value = getattr(args, name, None)
        if value is not None and value < least:
            problems.append(f"--{name}: {value} is below the least possible, {least}")
    for name, zero_allowed in (("lr", False), ("weight_decay", True), ("gradient_clipping", True)):
        value = getattr(args, name)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
            problems.append(f"--{name}: {value} is not a {'non-negative' if zero_allowed else 'positive'} number")
    if (fraction := getattr(args, "eval_fraction", None)) is not None and not 0 <= fraction < 1:
        problems.append(f"--eval_fraction: {fraction} is not at least 0 and below 1")
    if getattr(args, "streaming", False):
        if args.max_steps is None:
            problems.append("--streaming: a stream has no end; give --max_steps")
        if args.num_epochs > 1:
            problems.append("--num_epochs: a stream has no end, so it has no epochs; leave the flag out")
        for name, value in (("fraction", args.eval_fraction), ("interval", args.eval_interval_given)):
            if value:
                problems.append(f"--eval_{name}: documents are held out when a data set is prepared, not from a stream")
    if args.recompute is not None:
        if args.recompute != AUTO and not 0 <= args.recompute <= 1:
            problems.append(f"--recompute: {args.recompute} is neither auto nor from 0 to 1")
        args.gradient_checkpoint = args.recompute != 0
    if args.keep_attention:
        share = 1 if args.recompute == AUTO else recomputed_share(args)
        if 0 <= share <= 1 and not recomputed_layers(config, share):
            problems.append("--keep_attention: nothing is recomputed; give -g or a larger --recompute, or leave it out")
        if not args.flash_attention and args.sp == 1:
            problems.append("--keep_attention: it keeps what a fused kernel puts out; give -a too")
        if reenters(args):
            problems.append(f"--keep_attention: {args.plugin} has no such way of recomputing with --tp; leave it out")
    if args.seed >= 2**32:
        problems.append(f"--seed: {args.seed} is above the greatest possible, {2**32 - 1}")
    if args.max_length > config.max_position_embeddings:
        problems.append(
            f"--max_length: {args.max_length} is above the model's context of {config.max_position_embeddings} tokens"
        )
    if getattr(args, "document_mask", True):  # fine-tuning has no such flag: its examples always differ in length
        problems.extend(filter(None, [mixed_length_problem(config, args.max_length)]))
    if args.dry_run:
        problems.extend(card_problems(args) + ranks.launch_problems())
    else:
        problems.extend(launch_problems())
        given = {name: getattr(args, name) is not None for name in ("gpus", "gpu", "gpu_memory")}
        for name, is_given in (given | {"mfu": args.mfu_given}).items():
            if is_given:
                problems.append(f"--{name}: goes with --dry_run alone; a launcher sets what a run has")
    for name in ("save_dir", "tensorboard_dir", "profile"):
        if getattr(args, name, None) is not None:
            problems.extend(_folder_problems(f"--{name}", getattr(args, name)))
    if hasattr(args, "dataset"):
        problems.extend(_link_problems("--cache_dir", args.cache_dir))
        problems.extend(_outputs_among_data(args))
    if not problems:
        problems = _without_effect(args) + layout_problems(args, config)
    if problems:
        raise InputError(*problems)


def _without_effect(args: argparse.Namespace) -> list[str]:
    """One line for each flag that counts only beside another, which is not there."""
    found = []
    for name, mark, other in (
        ("shuffle_buffer", "shuffle_buffer_given", "streaming"),
        ("keep_every", "keep_every", "keep_checkpoints"),
        ("allow_changes", "allow_changes", "load"),
    ):
        if getattr(args, mark, None) and not getattr(args, other):
            found.append(f"--{name}: takes effect with --{other} alone; give that too, or leave it out")
    return found


def _outputs_among_data(args: argparse.Namespace) -> list[str]:
    """Folders of this run within its data, which a resume would read as more of them."""
    data = Path(args.dataset, getattr(args, "task_name", None) or "").resolve()
    if not data.is_dir() or (data / MANIFEST_NAME).exists():  # that of a prepared folder says what its data are
        return []
    return [
        f"--{name}: {folder} lies in --dataset {data}, whose files are read as data; give a folder elsewhere"
        for name, folder in (("save_dir", args.save_dir), ("tensorboard_dir", args.tensorboard_dir))
        if folder.resolve().is_relative_to(data)
    ]


def _folder_problems(flag: str, folder: Path) -> list[str]:
    """One line for what keeps `folder` from being made or written to, without making it."""
    if problems := _link_problems(flag, folder):
        return problems
    existing = existing_part(folder)
    if not existing.is_dir():
        return [f"{flag}: {existing} is a file; give a folder"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{flag}: no permission to write in {existing}; give another folder"]
    return []


def _link_problems(flag: str, folder: Path) -> list[str]:
    """One line for a link to nothing on the way to `folder`, in whose place no folder can be made."""
    for path in (folder.absolute(), *folder.absolute().parents):
        if path.is_symlink() and not path.exists():
            return [f"{flag}: {path} is a link to {os.readlink(path)}, which is not there; make that, or give a folder"]
    return []
