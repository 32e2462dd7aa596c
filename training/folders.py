"""The folders of a run: the checkpoint to resume from, and folders of other runs, which are refused."""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from checkpointing.folder import check_room, claim_save_dir, complete_checkpoints, find_checkpoint, read_running_states
from engine.job import Job
from runtime.collectives import gather, on_rank_zero
from runtime.console import InputError, NoRoom, rank, say
from runtime.files import LOCK, claim_folder
from training.run import Outputs, TrainState

OWNER = "run.json"  # in the folder of logs: the run that owns them


def resume_state(outputs: Outputs, tell: Callable[[str], None] = say) -> tuple[TrainState, Path | None]:
    """Return the state and the path of the checkpoint that `--load` names, or a fresh state and None.

    Args:
        tell: called with a message for each checkpoint that is skipped.

    Raises:
        InputError: `--load` names no checkpoint, or `--save_dir` holds some that this run would mix with its own.
    """
    folder = find_checkpoint(outputs.load, outputs.save_dir, tell) if outputs.load else None
    newest = next(complete_checkpoints(outputs.save_dir), None)
    if folder is None:
        if newest or (outputs.save_dir / "final").exists():
            raise InputError(
                f"--save_dir: {outputs.save_dir} holds the {'checkpoints' if newest else 'final model'} of a run; "
                f"{'resume it with -f latest, or ' if newest else ''}give another folder"
            )
        return TrainState(), None
    saved = read_running_states(folder)
    state = TrainState(**{name: saved[name] for name in asdict(TrainState()) if name in saved})
    if newest and folder.resolve().parent != outputs.save_dir.resolve():
        raise InputError(
            f"--save_dir: {outputs.save_dir} holds checkpoints of another run than --load {folder}; give another folder"
        )
    if newest and newest[0] > state.step:
        raise InputError(
            f"--load: {folder} is at step {state.step}, and --save_dir {outputs.save_dir} holds later checkpoints, up "
            f"to {newest[1].name}, which would be taken for this run's; move them away, or give another --save_dir"
        )
    return state, folder


def resume_together(outputs: Outputs) -> tuple[TrainState, Path | None]:
    """Return rank 0's `resume_state` on every rank: others may not yet see what it has renamed. Collective."""
    found: list[tuple[TrainState, Path | None]] = []
    on_rank_zero(lambda: found.append(resume_state(outputs)), "the run could not be resumed")
    return gather(found)[0][0]


def log_owner(save_dir: Path, folder: Path) -> dict[str, str]:
    """Return the owner of logs: the relative path to its checkpoints, which stays valid if both folders move."""
    return {"save_dir": os.path.relpath(save_dir.resolve(), folder.resolve())}


def refuse_foreign_logs(outputs: Outputs, step: int) -> None:
    """Refuse a folder of logs that this run does not continue.

    Raises:
        InputError: they belong to another --save_dir, or the run is new and their owner unknown.
    """
    folder, owner = outputs.tensorboard_dir, None  # None: logs of an older version
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        owner = {"save_dir": json.loads((folder / OWNER).read_bytes())["save_dir"]}
    logs = any(next(folder.glob(pattern), None) for pattern in ("metrics*.jsonl", "events.out.tfevents.*"))
    if logs and owner != log_owner(outputs.save_dir, folder) and (owner or not step):
        raise InputError(
            f"--tensorboard_dir: {folder} holds the logs of another run, not of --save_dir {outputs.save_dir}; "
            "give another folder, or move the logs away"
        )


def check_folders(outputs: Outputs, job: Job, step: int) -> None:
    """Refuse early, before hours of data preparation, what `claim_folders` would refuse later; make no folder.

    Raises:
        InputError: another run writes to --save_dir or --tensorboard_dir, or there is no room for one checkpoint.
        NoRoom: the same of a resume, whose flags cannot be at fault.
    """
    if rank():
        return
    if (outputs.save_dir / LOCK).exists():
        claim_save_dir(outputs.save_dir)
    if (outputs.tensorboard_dir / LOCK).exists():
        claim_folder(outputs.tensorboard_dir, "--tensorboard_dir")
    refuse_foreign_logs(outputs, step)
    check_room(outputs.save_dir, job, NoRoom if step else InputError)


def claim_folders(outputs: Outputs, state: TrainState, checkpoint: Path | None) -> None:
    """Lock the folders of checkpoints and logs for this run until it ends.

    Args:
        state, checkpoint: from `resume_state`; the plan is based on them.

    Raises:
        InputError: another run holds a folder, or has added or removed checkpoints since.
    """
    if rank() != 0:
        return
    claim_save_dir(outputs.save_dir)
    claim_folder(outputs.tensorboard_dir, "--tensorboard_dir")
    refuse_foreign_logs(outputs, state.step)
    new_state, new_checkpoint = resume_state(outputs, tell=lambda _: None)
    if (new_checkpoint, new_state.step, new_state.tokens) != (checkpoint, state.step, state.tokens):
        raise InputError(
            f"--load: another run has written to --save_dir {outputs.save_dir} since this one started: the "
            f"checkpoint to resume was {checkpoint or 'none'} and is {new_checkpoint or 'none'} now; start again"
        )
