"""Reading of checkpoints: lazy tensors, checksums, and the engine's state."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from checkpointing.folder import damaged_files, file_names, read_running_states
from engine.boost import Engine
from engine.shards import MASTER, MOMENTS, first_not_finite, restore
from engine.step import restore_loss_scaler
from model_utils import trained_specs
from runtime.collectives import gather, on_rank_zero
from runtime.console import InputError, rank, say, world_size
from runtime.files import replace_folder


class LazyTensors:
    """Tensors by name from several files, safetensors or .bin.

    One file is open at a time, and only the requested slices are read.
    """

    def __init__(self, files: dict[str, Path], prefix: str = ""):
        """
        Args:
            files: the file of each tensor.
            prefix: start of the tensors' names that the names in the files lack.
        """
        self.files = files
        self.prefix = prefix
        self.path: Path | None = None
        self.tensors: Any = None  # by name, or safe_open's handle

    def __getitem__(self, name: str) -> Any:
        """Return a tensor mapped from its file, or a safetensors slice; only indexing reads data."""
        if self.files[name] != self.path:
            self.path = self.files[name]
            self.tensors = (
                safe_open(self.path, framework="pt") if is_safetensors(self.path) else mapped_tensors(self.path)
            )
        name = name.removeprefix(self.prefix)
        return self.tensors.get_slice(name) if is_safetensors(self.path) else self.tensors[name]

    def shape(self, name: str) -> torch.Size:
        tensor = self[name]
        return tensor.shape if isinstance(tensor, torch.Tensor) else torch.Size(tensor.get_shape())


def is_safetensors(path: Path) -> bool:
    """Return True if transformers reads the file as safetensors, False if it uses torch.load."""
    return path.suffix == ".safetensors"


def mapped_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .bin file, memory-mapped; the format before torch 1.6 is read into memory instead."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def is_whole(folder: Path, newest: bool = False) -> bool:
    """Compare every file with its checksum; each rank checks a part of the files. Collective.

    Args:
        newest: `--load latest` has found it. If it is damaged, it is renamed, so that `latest` finds the one before.

    Returns:
        False if it was renamed.

    Raises:
        InputError: on every rank, with the names of the damaged files.
    """
    damaged = [name for names in gather(damaged_files(folder, rank(), world_size())) for name in names]
    if damaged and not newest:
        raise InputError(*(f"--load: {folder / name} is damaged; choose another checkpoint" for name in damaged))
    if damaged:
        aside, found = folder.with_name(f"{folder.name}.damaged"), f"--load latest: {folder / damaged[0]} is damaged"
        on_rank_zero(lambda: replace_folder(folder, aside), f"{found}, and its folder cannot be renamed")
        say(f"{found}; its folder is now {aside.name}")
    return not damaged


def load_checkpoint(folder: Path, engine: Engine) -> None:
    """Restore weights, Adam moments and loss scale. Call `is_whole` before. Collective.

    Raises:
        InputError: on every rank, if a weight is NaN or infinite.
    """
    config, adapters = engine.config, engine.job.adapters
    files = file_names(config, "optimizer", adapters is not None)
    tensors = LazyTensors(
        {
            f"{spec.name}.{key}": folder / "optimizer" / files[spec.group]
            for spec in trained_specs(config, adapters)
            for key in (MASTER, *MOMENTS)
        }
    )
    states = read_running_states(folder)
    restore(engine, lambda name, key: tensors[f"{name}.{key}"], states["adam_steps"])
    if name := first_not_finite(engine):
        raise InputError(f"--load: {name} in {folder} has a NaN or an infinity; choose an earlier checkpoint")
    restore_loss_scaler(engine, states["loss_scaler"])
