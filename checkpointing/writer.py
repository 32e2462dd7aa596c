"""Checkpoints written in the background: copied to host memory, then written, checked and renamed by a thread.

Every rank writes its own files and, once they are on disk, a part file with their sizes and checksums. Rank 0 waits for
all part files, builds the manifest from them, and renames the folder: a checkpoint is complete or does not exist. The
threads run no collective operation; the training thread raises their errors.
"""

import contextlib
import itertools
import json
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from checkpointing.folder import (
    CHECKPOINT,
    LR_SCHEDULER,
    MANIFEST,
    RUNNING_STATES,
    check_room,
    complete_checkpoints,
    file_names,
    incomplete_files,
    required_files,
    write_adapter,
    write_model_index,
    write_tensors,
)
from engine import device
from engine.boost import Engine
from engine.shards import MASTER, MOMENTS, LocalShard, local_shards, staging_bytes
from engine.step import loss_scaler_state
from runtime import watchdog
from runtime.collectives import POLL_SECONDS, any_alive, gather, on_rank_zero, raise_together
from runtime.console import RunError, below, local_world_size, rank, say, size_text, world_size
from runtime.files import checksum, replace_folder, write_json

NOT_WRITTEN = "the checkpoint could not be written, and no incomplete one is left under its name"
STALLED_SECONDS = 30  # without a new byte, after which a failed run gives up its last checkpoint
SPARE_HOST_MEMORY = 0.1  # fraction of host memory that staging a checkpoint leaves free
File = tuple[str, dict[str, torch.Tensor]]  # a part of the model and its float32 tensors, by 'parameter.key'


@dataclass(frozen=True)
class Retention:
    """Settings that decide when checkpoints are saved and which are kept."""

    save_interval: int = 1000  # optimizer steps; 0: only the end of the run is saved
    keep_checkpoints: int | None = None  # number of the newest ones to keep; None: all
    keep_every: int | None = None  # also keep those at multiples of this step

    def problems(self) -> list[str]:
        """Return a line for each number that is too small, and for a flag without effect."""
        counts = {name: value for name, value in vars(self).items() if name != "save_interval"}
        problems = below(0, save_interval=self.save_interval) + below(1, **counts)
        if not problems and self.keep_every and not self.keep_checkpoints:
            problems.append("--keep_every: takes effect only with --keep_checkpoints; give that too, or leave it out")
        return problems

    def is_due(self, step: int) -> bool:
        """Return True if a checkpoint is saved after the step, even if it is not the last."""
        return self.save_interval > 0 and step % self.save_interval == 0


class CheckpointWriter:
    """Writer of checkpoints, at most one in flight: `save` waits for the previous one, `wait` for the last."""

    def __init__(
        self,
        save_dir: Path,
        engine: Engine,
        retention: Retention,
        background: bool = True,
        latest: Path | None = None,
        completed: Callable[[int, Path], None] = lambda step, folder: None,
    ):
        """
        Args:
            background: copy the state to host memory, if it fits, and write it while training goes on.
            latest: the checkpoint that the run resumes from.
            completed: called in a thread of rank 0 with the step and folder of each checkpoint that is in its place,
                before old ones are removed.
        """
        self.save_dir, self.engine, self.job = save_dir, engine, engine.job
        self.background = background
        self.retention = retention
        self.model_files, self.optimizer_files = (
            file_names(self.job.config, kind, self.job.adapters is not None) for kind in ("model", "optimizer")
        )
        self._positions = {group: number for number, group in enumerate(self.model_files)}
        self.latest, self.completed = latest, completed
        self._reports: list[str] = []
        self.error: str | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        self._allocation: threading.Thread | None = None
        self._thread: threading.Thread | None = None
        self._abandoned = False
        self._target: Path  # folder of the checkpoint in flight
        self._temporary: Path  # where it is written

    def allocate(self) -> None:
        """Begin to allocate the buffers of `save`, if they fit into host memory, in a thread. Collective.

        The first save would wait a second for 1 to 2 GB to be pinned. Call this before other slow work, such as loading
        weights.
        """
        shards_by_file = self._by_file()
        if self.background and self._fits_in_memory(shards_by_file):
            buffers = {
                f"{shard.spec.name}.{key}": (shard.spec.shape, shard.gathers_on_gpu)
                for shard in self._written(shards_by_file)
                for key in (MASTER, *MOMENTS)
            }
            own_device = device.current_device()
            self._allocation = threading.Thread(target=self._allocate, args=(buffers, own_device), daemon=True)
            self._allocation.start()

    def _allocate(self, buffers: dict[str, tuple[torch.Size, bool]], own_device: torch.device) -> None:
        if own_device.type == "cuda":
            torch.cuda.set_device(own_device)  # a thread begins with GPU 0, where pinning would make a context
        try:
            for name, (shape, pinned) in buffers.items():
                self._buffers[name] = torch.empty(shape, dtype=torch.float32, pin_memory=pinned)
        except RuntimeError:
            self._buffers.clear()  # the first save tries again, and reports the error

    def save(self, states: dict[str, Any]) -> None:
        """Start to write a checkpoint, and return when the weights may change again. Collective.

        Args:
            states: for running_states.json, beside the loss scale; its `epoch` and `step` name the folder.

        Raises:
            RunError: on every rank, if the previous checkpoint failed on any, or this one has no room.
        """
        started = time.perf_counter()
        watchdog.mark(watchdog.SAVE)
        self.wait()
        self._target = self.save_dir / CHECKPOINT.format(**states)
        self._temporary = self._target.with_name(f".{self._target.name}.incomplete")
        on_rank_zero(self._begin, self._failure)
        shards_by_file = self._by_file()
        json_files = self._json_files(states)
        files: dict[str, dict] = {}
        staged: list[File] = []
        if self.background and self._fits_in_memory(shards_by_file):
            staged = self._staged(shards_by_file)
        else:
            for shards in shards_by_file:  # join before the next exchange, which would time out on a slow disk
                tensors = {name: tensor.cpu() for shard in shards for name, tensor, _ in self._gathered(shard)}
                self._start(self._write, shards[0].spec.group if shards else "", tensors, files)
                self._join()
        stall = time.perf_counter() - started
        self._start(self._finish, staged, json_files, files, started, stall)

    def wait(self) -> None:
        """Wait until the checkpoint in flight is in its place. Collective.

        Raises:
            RunError: on every rank, if it failed on any.
        """
        if self._thread is not None:
            self._join()
            self.latest = self._target

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        self._thread = threading.Thread(target=work, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def _join(self) -> None:
        """Wait until every rank's thread has ended. Collective. Raises RunError, on every rank, if one failed."""
        assert self._thread is not None
        while any_alive(self._thread):
            # A rank that could not even write its part file would leave rank 0's thread waiting for it.
            self._abandoned = any(gather(self.error))
        self._thread = None
        # The other ranks wait for the removal: once one ends, the launcher ends all.
        if any(gather(self.error)) and rank() == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)  # a resume needs the room
        raise_together(self.error, self._failure)

    @property
    def how_to_resume(self) -> str:
        """Advice for the message of a run that ends with no checkpoint in flight; the same on every rank."""
        return f"resume with -f {self.latest}" if self.latest else "start again (no checkpoint was saved yet)"

    @property
    def _failure(self) -> str:
        return f"{NOT_WRITTEN}; fix the cause (--keep_checkpoints needs less room) and {self.how_to_resume}"

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """After a failure, wait for the checkpoint in flight as long as its files grow. Not collective."""
        written, since = -1, time.monotonic()
        while kind and self._thread and self._thread.is_alive() and time.monotonic() - since < STALLED_SECONDS:
            with contextlib.suppress(OSError):  # files come and go
                size = sum(path.stat().st_size for path in self._temporary.rglob("*"))
                written, since = size, (since if size == written else time.monotonic())
            watchdog.alive()
            time.sleep(POLL_SECONDS)
        for report in self.take_reports():
            say(report)

    @property
    def writing(self) -> bool:
        """True if a checkpoint is in flight on any rank. Collective."""
        return any(gather(self._thread is not None and self._thread.is_alive()))

    def take_reports(self) -> list[str]:
        """Return one line for each checkpoint finished since the last call; empty except on rank 0."""
        reports, self._reports = self._reports, []
        return reports

    def _begin(self) -> None:
        self.save_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._temporary, ignore_errors=True)
        check_room(self.save_dir, self.job)
        (self._temporary / "model").mkdir(parents=True)
        (self._temporary / "optimizer").mkdir()

    def _json_files(self, states: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the JSON files; a resume computes the schedule from the step, and reads only the running states."""
        groups = self.engine.optimizer.optim.param_groups
        schedule = {"last_epoch": states["step"], "base_lrs": [self.job.optimization.lr for _ in groups]}
        return {RUNNING_STATES: states | {"loss_scaler": loss_scaler_state(self.engine)}, LR_SCHEDULER: schedule}

    def _by_file(self) -> list[list[LocalShard]]:
        """Return the shards of each file of this stage, padded with empty lists to the largest stage. Collective."""
        files = [
            list(members)
            for _, members in itertools.groupby(local_shards(self.engine), key=lambda shard: shard.spec.group)
        ]
        return files + [[]] * (max(gather(len(files))) - len(files))

    def _gathered(self, shard: LocalShard) -> Iterator[tuple[str, torch.Tensor, bool]]:
        """Yield a parameter's full tensors on the rank that writes it, none on the others. Collective.

        Yields:
            The name, the tensor, and True if it is not the optimizer's own, which updates change.
        """
        for key in (MASTER, *MOMENTS):
            full = shard.gather(key, self._positions[shard.spec.group])
            if full is not None:
                yield f"{shard.spec.name}.{key}", full.detach(), full.data_ptr() != shard.tensor(key).data_ptr()

    def _staged(self, shards_by_file: list[list[LocalShard]]) -> list[File]:
        """Begin to copy the files that this rank writes to host buffers, which later checkpoints reuse. Collective.

        Files have different writers in turn. Their parameters are gathered in turn, so that all ranks copy at once. The
        copies go on while training does; see `_finish`.
        """
        staged = defaultdict[str, dict[str, torch.Tensor]](dict)
        for shard in in_turn(shards_by_file, dist.get_world_size()):
            for name, full, temporary in self._gathered(shard):
                if name not in self._buffers:
                    self._buffers[name] = torch.empty(full.shape, dtype=full.dtype, pin_memory=full.is_cuda)
                staged[shard.spec.group][name] = self.engine.copies.copy(self._buffers[name], full, temporary)
        return list(staged.items())

    def _written(self, shards_by_file: list[list[LocalShard]]) -> list[LocalShard]:
        """Return the parameters that this rank writes."""
        shards = itertools.chain(*shards_by_file)
        return [shard for shard in shards if shard.is_writer(self._positions[shard.spec.group])]

    def _fits_in_memory(self, shards_by_file: list[list[LocalShard]]) -> bool:
        """Return True if every rank's files fit into its host's memory. Collective."""
        if self._allocation is not None:
            self._allocation.join()
        written = self._written(shards_by_file)
        needed = sum(staging_bytes(shard.spec.shape, shard.gathers_on_gpu) for shard in written)
        # Before the first step, moments in host memory have not been allocated.
        needed += sum(
            len(MOMENTS) * 4 * shard.storage.numel()
            for shard in itertools.chain(*shards_by_file)
            if not shard.adam_state and not shard.storage.is_cuda
        )
        total, available = host_memory()
        enough = needed * local_world_size() < available - SPARE_HOST_MEMORY * total
        fits = all(gather(enough or not written or bool(self._buffers)))
        if not fits:
            say("checkpoints: too little host memory to write them in the background; training waits for each")
        return fits

    def _write(self, group: str, tensors: dict[str, torch.Tensor], files: dict[str, dict]) -> None:
        """Write and checksum a part's files, unless an earlier one has failed."""
        if not tensors or self.error:
            return
        try:
            suffix = f".{MASTER}"
            weights = {
                name.removesuffix(suffix): tensor.to(self.job.dtype).contiguous()
                for name, tensor in tensors.items()
                if name.endswith(suffix)
            }
            states = {name: tensor.contiguous() for name, tensor in tensors.items()}
            for name, content in (
                (f"model/{self.model_files[group]}", weights),
                (f"optimizer/{self.optimizer_files[group]}", states),
            ):
                path = self._temporary / name
                write_tensors(path, content)
                files[name] = checksum(path)
        except Exception as error:  # safetensors raises its own type, also for a full disk
            self.error = f"{type(error).__name__}: {error}"

    def _finish(
        self, staged: list[File], json_files: dict, files: dict[str, dict], started: float, stall: float
    ) -> None:
        try:
            self.engine.copies.wait()
        except RuntimeError as error:
            self.error = f"{type(error).__name__}: {error}"
        for group, tensors in staged:
            self._write(group, tensors, files)
        try:
            self._conclude(json_files, files, started, stall)
        except RunError as error:
            self.error = self.error or str(error)
        except Exception as error:
            self.error = self.error or f"{type(error).__name__}: {error}"

    def _conclude(self, json_files: dict, files: dict[str, dict], started: float, stall: float) -> None:
        temporary, target = self._temporary, self._target
        part = {"error": self.error} if self.error else {"files": files}
        write_json(temporary / f"part-{rank():05d}.json", part)
        if rank() != 0:
            return
        all_files = self._wait_for_parts()
        if all_files is None:
            return
        for name, content in json_files.items():
            write_json(temporary / name, content)
        config, adapters = self.job.config, self.job.adapters
        if adapters:
            write_adapter(temporary / "model", config, adapters)
        else:
            write_model_index(temporary / "model", config)
        required = sorted(required_files(config, adapters is not None))
        all_files = {name: all_files.get(name) or checksum(temporary / name) for name in required}
        write_json(temporary / MANIFEST, {"format": 1, "files": all_files})
        if incomplete := incomplete_files(temporary):
            raise RunError(f"{target}/{incomplete[0]} is gone or cut short although it was written")
        replace_folder(temporary, target)
        size, seconds = sum(file["bytes"] for file in all_files.values()), time.perf_counter() - started
        self._reports.append(
            f"checkpoint: {target}, {size_text(size)} in {seconds:.1f} s, {size_text(size / seconds)}/s; "
            f"training waited {stall * 1000:.0f} ms"
        )
        self.completed(json_files[RUNNING_STATES]["step"], target)
        try:
            remove_old_checkpoints(self.save_dir, self.retention)
        except OSError as error:
            self._reports.append(f"checkpoint: an old one could not be removed: {error}")

    def _wait_for_parts(self) -> dict[str, dict] | None:
        """Return the files of all ranks; None if a rank has failed."""
        files = {}
        for number in range(world_size()):
            path = self._temporary / f"part-{number:05d}.json"
            while not path.exists():
                if self._abandoned:
                    return None
                time.sleep(POLL_SECONDS)
            part = json.loads(path.read_text(encoding="utf-8"))
            if "error" in part:
                return None  # that rank raises it itself
            files.update(part["files"])
            path.unlink()
        return files


def in_turn(files: list[list[LocalShard]], count: int) -> Iterator[LocalShard]:
    """Yield the parameters of every `count` successive files: the first of each, then the second of each."""
    for first in range(0, len(files), count):
        for shards in itertools.zip_longest(*files[first : first + count]):
            yield from filter(None, shards)


def remove_old_checkpoints(save_dir: Path, retention: Retention) -> None:
    """Remove old checkpoints, manifest first, so that no partly removed one looks complete."""
    if retention.keep_checkpoints is None:
        return
    for step, folder in list(complete_checkpoints(save_dir))[retention.keep_checkpoints :]:
        if not retention.keep_every or step % retention.keep_every:
            (folder / MANIFEST).unlink()
            shutil.rmtree(folder.replace(folder.with_name(f".{folder.name}.old")), ignore_errors=True)


def host_memory(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Return total and available bytes of host memory: the machine's, or less if control groups limit this process.

    Cached files do not count as used by a group. See the kernel's admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = mount / "memory" if controllers else mount
            names = ("limit_in_bytes", "usage_in_bytes", "total_") if controllers else ("max", "current", "")
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):  # a container may see only the last
                with contextlib.suppress(OSError, ValueError, KeyError):
                    limit, used = (int((folder / f"memory.{name}").read_text()) for name in names[:2])
                    figures = dict(figure.split() for figure in (folder / "memory.stat").read_text().splitlines())
                    cached = sum(int(figures[f"{names[2]}{kind}_file"]) for kind in ("active", "inactive"))
                    total, available = min(total, limit), min(available, limit - used + cached)
                if folder == root:
                    break
    return total, available
