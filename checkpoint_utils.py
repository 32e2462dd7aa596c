"""Checkpoints: complete or absent, in Hugging Face's layout, independent of plugin and number of ranks.

    epoch0-step1000/
        model/              config.json, safetensors: what AutoModelForCausalLM loads
        optimizer/          float32 master weights and Adam moments, full tensors by parameter name
        lr_scheduler, running_states.json
        manifest.json       every file and its size; written last

One file holds one decoder layer, and the writing is dealt out over the data-parallel ranks.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from colossalai.booster.plugin.plugin_base import Plugin
from colossalai.interface import ModelWrapper, OptimizerWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedTokenizerBase

import sharded_state
from booster_utils import loss_scaler
from console import InputError, RunError, rank
from model_utils import load_config, parameter_specs

MANIFEST = "manifest.json"
RUNNING_STATES = "running_states.json"
LR_SCHEDULER = "lr_scheduler"
SHAPE_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


def checkpoint_name(epoch: int, step: int) -> str:
    return f"epoch{epoch}-step{step}"


def _sync(path: Path) -> None:
    """Forces a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def _raise_together(error: Exception | None) -> None:
    """Raises on every rank when any has failed, so that none waits for one that is gone."""
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    first = next((f"rank {number}: {text}" for number, text in enumerate(errors) if text), None)
    if first:
        raise RunError(
            f"the checkpoint could not be written: {first}; nothing incomplete stands under its name"
        ) from error


def _on_rank_zero(action: Callable[[], None]) -> None:
    """Runs `action` on rank 0, with all ranks waiting for it and sharing its failure."""
    error = None
    if rank() == 0:
        try:
            action()
        except OSError as caught:
            error = caught
    _raise_together(error)


# ---------------------------------------------------------------------------------------------------------------- save


def _file_names(config: LlamaConfig, kind: str) -> dict[str, str]:
    """File name of each part of the model (see ParameterSpec.group), the same under every layout."""
    groups = list(dict.fromkeys(spec.group for spec in parameter_specs(config)))
    return {
        group: f"{kind}-{number:05d}-of-{len(groups):05d}.safetensors" for number, group in enumerate(groups, start=1)
    }


def _write_tensors(folder: Path, plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, config: LlamaConfig):
    """Writes this rank's share of model/ and optimizer/. Collective: a rank that cannot write goes on taking part."""
    model_files, optimizer_files = _file_names(config, "model"), _file_names(config, "optimizer")
    positions = {group: number for number, group in enumerate(model_files)}
    error = None
    shards = sharded_state.local_shards(plugin, model, optimizer)
    for group, members in groupby(shards, key=lambda shard: shard.spec.group):
        weights, states = {}, {}
        for shard in members:
            writer = positions[group] % dist.get_world_size(shard.data_group)
            for key in (sharded_state.MASTER, *sharded_state.MOMENTS):
                full = shard.gather(key, writer)
                if full is None or error:
                    continue
                states[f"{shard.spec.name}.{key}"] = full.contiguous()
                if key == sharded_state.MASTER:
                    weights[shard.spec.name] = full.to(config.torch_dtype).contiguous()
        if weights:
            try:
                for kind, files, tensors in (("model", model_files, weights), ("optimizer", optimizer_files, states)):
                    save_file(tensors, folder / kind / files[group], metadata={"format": "pt"})
                    _sync(folder / kind / files[group])
            except (OSError, SafetensorError) as caught:
                error = caught
    _raise_together(error)


def _write_model_index(folder: Path, config: LlamaConfig) -> None:
    files = _file_names(config, "model")
    specs = parameter_specs(config)
    size = sum(spec.shape.numel() for spec in specs) * config.torch_dtype.itemsize
    index = {"metadata": {"total_size": size}, "weight_map": {spec.name: files[spec.group] for spec in specs}}
    _write_json(folder / "model.safetensors.index.json", index)
    saved = copy.deepcopy(config)
    saved.use_cache = True
    saved.architectures = ["LlamaForCausalLM"]
    saved.to_json_file(folder / "config.json")
    _sync(folder / "config.json")


def _replace(temporary: Path, target: Path) -> None:
    """Puts a finished folder in its place; the only moment at which a folder of that name may be absent is a rename."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def save(
    save_dir: Path,
    plugin: Plugin,
    model: ModelWrapper,
    optimizer: OptimizerWrapper,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: LlamaConfig,
    running_states: dict,
) -> Path:
    """Writes one checkpoint, collectively, and returns its folder.

    Args:
        running_states: the run's state as JSON; `epoch` and `step` name the folder.

    Raises:
        RunError: on every rank, when any could not write.
    """
    target = save_dir / checkpoint_name(running_states["epoch"], running_states["step"])
    temporary = target.with_name(f".{target.name}.incomplete")

    def begin():
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "model").mkdir(parents=True)
        (temporary / "optimizer").mkdir()

    def finish():
        _write_model_index(temporary / "model", config)
        _write_json(temporary / LR_SCHEDULER, lr_scheduler.state_dict())
        _write_json(temporary / RUNNING_STATES, {**running_states, "loss_scaler": _loss_scaler_state(optimizer)})
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
        _write_json(temporary / MANIFEST, {"format": 1, "files": sizes})
        for folder in (temporary / "model", temporary / "optimizer", temporary):
            _sync(folder)
        _replace(temporary, target)

    _on_rank_zero(begin)
    _write_tensors(temporary, plugin, model, optimizer, config)
    _on_rank_zero(finish)
    return target


def _loss_scaler_state(optimizer: OptimizerWrapper) -> dict | None:
    scaler = loss_scaler(optimizer)
    if scaler is None:
        return None
    grad_scaler = scaler.grad_scaler
    return {
        "scale": grad_scaler.scale.item(),
        "growth_step": grad_scaler._growth_step,
        "hysteresis_step": grad_scaler._hysteresis_step,
    }


def export(checkpoint: Path, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes of a checkpoint's model a folder that AutoModelForCausalLM and AutoTokenizer load. Collective.

    The weights are hard links where the file system has them, so that the folder costs no space.
    """
    temporary = target.with_name(f".{target.name}.incomplete")

    def action():
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            shutil.copytree(checkpoint / "model", temporary, copy_function=os.link)
        except (OSError, shutil.Error):
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(checkpoint / "model", temporary)
        tokenizer.save_pretrained(temporary)
        _replace(temporary, target)

    _on_rank_zero(action)


# ---------------------------------------------------------------------------------------------------------------- load


def is_complete(folder: Path) -> bool:
    """Whether a folder has a manifest and every file of it in its size."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def find_checkpoint(load: str, save_dir: Path) -> Path:
    """The folder that `--load` names; `latest` is the complete one with most steps in `save_dir`.

    Raises:
        InputError: there is none, or it is something else than a complete checkpoint.
    """
    if load == "latest":
        steps = {}
        for folder in save_dir.glob("epoch*-step*"):
            match = re.fullmatch(r"epoch(\d+)-step(\d+)", folder.name)
            if match and is_complete(folder):
                steps[folder] = (int(match[2]), int(match[1]))
        if not steps:
            raise InputError(f"--load latest: no complete checkpoint in --save_dir {save_dir}")
        return max(steps, key=steps.get)
    folder = Path(load)
    if not folder.exists():
        raise InputError(f"--load: {folder} does not exist; give a folder epochE-stepS, or 'latest'")
    if is_complete(folder):
        return folder
    if (folder / "config.json").is_file():
        raise InputError(
            f"--load: {folder} holds a Hugging Face model without training state; "
            "to begin from its weights use --init_from, to take only its sizes use --config"
        )
    if (folder / MANIFEST).is_file() or (folder / RUNNING_STATES).is_file():
        raise InputError(f"--load: {folder} is an incomplete checkpoint; choose another, or 'latest'")
    raise InputError(f"--load: {folder} is not a checkpoint; give a folder epochE-stepS, or 'latest'")


def check_model(folder: Path, config: LlamaConfig, flag: str) -> None:
    """Refuses a folder whose config.json describes another model than `config`."""
    saved = load_config(str(folder))
    different = [key for key in SHAPE_KEYS if getattr(saved, key) != getattr(config, key)]
    if different:
        listing = ", ".join(f"{key} {getattr(saved, key)} (not {getattr(config, key)})" for key in different)
        raise InputError(f"{flag}: {folder} is of another model than --config: {listing}")


def read_running_states(folder: Path) -> dict:
    return json.loads((folder / RUNNING_STATES).read_text(encoding="utf-8"))


class _LazySafetensors:
    """Tensors by name from several files, of which one is open at a time and only the slices asked for are read."""

    def __init__(self, files: dict[str, Path]):
        self.files = files
        self.path, self.file = None, None

    def __getitem__(self, name: str):
        if self.files[name] != self.path:
            self.path = self.files[name]
            self.file = safe_open(self.path, framework="pt")
        return self.file.get_slice(name)


def pretrained_weights(folder: Path) -> dict[str, Path]:
    """The safetensors file of each parameter in a Hugging Face model folder.

    Raises:
        InputError: the folder holds no such weights, or not all that its index names.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / file for name, file in weight_map.items()}
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                files = dict.fromkeys(file.keys(), single)
        else:
            raise InputError(f"--init_from: {folder} holds no model.safetensors nor its index")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"--init_from: the weights in {folder} cannot be read: {error}") from error
    missing = sorted({path.name for path in files.values() if not path.is_file()})
    if missing:
        raise InputError(f"--init_from: {folder} lacks {', '.join(missing)}, which its index names")
    return files


def check_pretrained(folder: Path, config: LlamaConfig) -> None:
    """Refuses, before anything is allocated, a model folder that `load_pretrained` could not load into `config`."""
    if not (folder / "config.json").is_file():
        raise InputError(f"--init_from: {folder} is not a Hugging Face model folder: it has no config.json")
    check_model(folder, config, "--init_from")
    missing = [spec.name for spec in parameter_specs(config) if spec.name not in pretrained_weights(folder)]
    if missing:
        raise InputError(f"--init_from: the weights in {folder} lack {missing[0]} ({len(missing)} missing)")


def load_pretrained(folder: Path, plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper) -> None:
    """Sets the weights from a Hugging Face model folder, each rank reading its own slices."""
    weights = _LazySafetensors(pretrained_weights(folder))
    sharded_state.restore(plugin, model, optimizer, lambda name, key: weights[name], adam_steps=0)


def load(
    folder: Path,
    plugin: Plugin,
    model: ModelWrapper,
    optimizer: OptimizerWrapper,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: LlamaConfig,
) -> None:
    """Restores weights, Adam moments, learning-rate schedule and loss scale, each rank reading its own slices."""
    files = _file_names(config, "optimizer")
    tensors = _LazySafetensors(
        {
            f"{spec.name}.{key}": folder / "optimizer" / files[spec.group]
            for spec in parameter_specs(config)
            for key in (sharded_state.MASTER, *sharded_state.MOMENTS)
        }
    )
    states = read_running_states(folder)
    sharded_state.restore(plugin, model, optimizer, lambda name, key: tensors[f"{name}.{key}"], states["adam_steps"])
    lr_scheduler.load_state_dict(json.loads((folder / LR_SCHEDULER).read_text(encoding="utf-8")))
    for group, lr in zip(lr_scheduler.optimizer.param_groups, lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr  # a scheduler leaves this to the optimizer's own state
    scaler, saved = loss_scaler(optimizer), states["loss_scaler"]
    if scaler is not None and saved is not None:
        grad_scaler = scaler.grad_scaler
        grad_scaler._scale.fill_(saved["scale"])
        grad_scaler._growth_step = saved["growth_step"]
        grad_scaler._hysteresis_step = saved["hysteresis_step"]
