"""Checkpoints: complete or absent, in Hugging Face's layout, independent of plugin and number of ranks.

    epoch0-step1000/
        model/              config.json, safetensors; AutoModelForCausalLM loads it
        optimizer/          float32 master weights and Adam moments, full tensors by parameter name
        lr_scheduler, running_states.json
        manifest.json       every file with size and checksum; written last

One file holds one decoder layer. This module names, finds and verifies checkpoints; writer.py writes them, and
reader.py restores them.
"""

import copy
import json
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from engine.job import Job
from model_utils import load_config, parameter_specs, rotates_alike, trained_specs
from runtime.collectives import gather, on_rank_zero
from runtime.console import InputError, rank, say, size_text
from runtime.files import checksum, claim_folder, existing_part, sync, write_json

CHECKPOINT = "epoch{epoch}-step{step}"
LATEST = "latest"  # value of --load: the newest complete checkpoint in --save_dir
MANIFEST = "manifest.json"
RUNNING_STATES = "running_states.json"
CONFIG, MODEL_INDEX = "config.json", "model.safetensors.index.json"
ADAPTER_FILE, ADAPTER_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
LR_SCHEDULER = "lr_scheduler"
LEFTOVERS = (".epoch*-step*.*", ".final.*", ".merged-*", ".seen-*", ".evaluated-*")  # of killed runs
SHARED_SECONDS = 20  # for other machines to see a new file
MODEL_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "head_dim",
    "attention_dropout",
)


def claim_save_dir(save_dir: Path) -> None:
    """Claim a folder for this run's checkpoints (see `claim_folder`), and remove what killed runs have left in it."""
    claim_folder(save_dir, "--save_dir")
    for pattern in LEFTOVERS:
        for remains in save_dir.glob(pattern):
            shutil.rmtree(remains, ignore_errors=True)


def check_shared(save_dir: Path) -> None:
    """Refuse a folder that is not the same for all ranks. Collective.

    Raises:
        InputError: on every rank; names the first machine that does not see what rank 0 writes.
    """
    seen = save_dir / f".seen-{gather(uuid.uuid4().hex)[0]}"
    on_rank_zero(seen.mkdir, f"--save_dir: {save_dir} could not be written to")
    deadline = time.monotonic() + SHARED_SECONDS
    while not seen.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    views = gather((seen.exists(), socket.gethostname()))
    if rank() == 0:
        seen.rmdir()
    for number, (shared, host) in enumerate(views):
        if not shared:
            raise InputError(
                f"--save_dir: rank {number} on {host} does not see what rank 0 on {views[0][1]} writes in {save_dir}; "
                "give a folder on a file system that all share"
            )


def check_room(save_dir: Path, job: Job, error: type[Exception] = InputError) -> None:
    """Raise an error if the file system has no room for a checkpoint; the folder need not exist yet."""
    needed, free = checkpoint_bytes(job), shutil.disk_usage(existing_part(save_dir)).free
    if free < needed:
        raise error(
            f"--save_dir: a checkpoint takes {size_text(needed)}, and {size_text(free)} are free in {save_dir}; "
            "make room or give another folder"
        )


def file_names(config: LlamaConfig, kind: str, adapted: bool = False) -> dict[str, str]:
    """Return the file name of each trained part of the model (see ParameterSpec.group), the same in every layout.

    Args:
        adapted: only adapters are trained.
    """
    groups = [f"model.layers.{number}" for number in range(config.num_hidden_layers)]
    if not adapted:  # adapters are only in layers
        head = [] if config.tie_word_embeddings else ["lm_head"]
        groups = ["model.embed_tokens", *groups, "model.norm", *head]
    return {
        group: f"{kind}-{number:05d}-of-{len(groups):05d}.safetensors" for number, group in enumerate(groups, start=1)
    }


def required_files(config: LlamaConfig, adapted: bool = False) -> set[str]:
    """Return the paths in a checkpoint, of all weights or only of adapters, of all its files except the manifest."""
    if adapted:
        model = {CONFIG, ADAPTER_FILE, ADAPTER_CONFIG}
    else:
        model = {CONFIG, MODEL_INDEX, *file_names(config, "model").values()}
    optimizer = file_names(config, "optimizer", adapted).values()
    folders = {f"model/{name}" for name in model} | {f"optimizer/{name}" for name in optimizer}
    return {RUNNING_STATES, LR_SCHEDULER} | folders


def checkpoint_bytes(job: Job) -> int:
    """Return the bytes of a checkpoint: trained weights in working precision, and three float32 numbers for each."""
    trained = sum(spec.shape.numel() for spec in trained_specs(job.config, job.adapters))
    return trained * (job.dtype.itemsize + 12)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file to disk, with the permissions that the umask gives.

    safetensors writes through a temporary file that only its owner can read.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)
    sync(path)


def write_model_index(folder: Path, config: LlamaConfig) -> None:
    """Write config.json and the index of the safetensors files."""
    files, specs = file_names(config, "model"), parameter_specs(config)
    size = sum(spec.shape.numel() for spec in specs) * config.torch_dtype.itemsize
    weight_map = {spec.name: files[spec.group] for spec in specs}
    write_json(folder / MODEL_INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    _write_config(folder, config)


def _write_config(folder: Path, config: LlamaConfig) -> None:
    saved = copy.deepcopy(config)
    saved.use_cache = True
    saved.architectures = ["LlamaForCausalLM"]
    saved.to_json_file(folder / CONFIG)


def write_adapter(folder: Path, config: LlamaConfig, adapters: LoraConfig) -> None:
    """Join the adapters' files into the one that peft loads, and write peft's configuration.

    config.json stays, so that a resume can check that it trains the same model.
    """
    files = [folder / name for name in file_names(config, "model", adapted=True).values()]
    tensors = {}
    for file in files:
        tensors |= {f"{PEFT_PREFIX}{name}": tensor for name, tensor in load_file(file).items()}
    write_tensors(folder / ADAPTER_FILE, tensors)
    adapters.save_pretrained(folder)
    _write_config(folder, config)
    for file in files:
        file.unlink()


def _manifest(folder: Path) -> dict[str, dict] | None:
    """Return the manifest's files; None if it cannot be read or does not list exactly the files of a checkpoint."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = {name: {"bytes": int(file["bytes"]), "xxh3_64": str(file["xxh3_64"])} for name, file in files.items()}
        config = LlamaConfig.from_dict(json.loads((folder / "model" / CONFIG).read_text(encoding="utf-8")))
        if config.num_hidden_layers > len(files):  # or a damaged number could make endless names
            return None
        return files if files.keys() == required_files(config, f"model/{ADAPTER_FILE}" in files) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def incomplete_files(folder: Path) -> list[str]:
    """Return a checkpoint's files that are missing or differ in size from the manifest, or an invalid manifest."""
    files = _manifest(folder)
    if files is None:
        return [MANIFEST]
    incomplete = []
    for name, file in files.items():
        try:
            whole = (folder / name).stat().st_size == file["bytes"]
        except OSError:
            whole = False
        if not whole:
            incomplete.append(name)
    return incomplete


def is_complete(folder: Path) -> bool:
    """Return True if a checkpoint's manifest is valid, and all its files exist in their sizes."""
    return not incomplete_files(folder)


def _checkpoints(save_dir: Path) -> list[tuple[int, Path]]:
    """Return step and folder of every checkpoint, complete or not, the newest first."""
    found = []
    for folder in save_dir.glob("*epoch*-step*"):
        match = re.fullmatch(r"\.?epoch(\d+)-step(\d+)(\.incomplete|\.old)?", folder.name)
        if match and folder.is_dir():
            found.append((int(match[2]), folder))
    return sorted(found, reverse=True)


def complete_checkpoints(save_dir: Path) -> Iterator[tuple[int, Path]]:
    """Yield step and folder of the complete checkpoints in a folder, the newest first.

    A resume reads the running states before it could pass over a checkpoint whose other files are damaged.
    """
    for step, folder in _checkpoints(save_dir):
        if folder.name[0] != "." and is_complete(folder) and _has_running_states(folder):
            yield step, folder


def find_checkpoint(load: str, save_dir: Path, tell: Callable[[str], None] = say) -> Path | None:
    """Return the checkpoint that `--load` names; `latest` is the newest complete one, and reports those passed over.

    Returns:
        None if `latest` finds no checkpoint in `save_dir`: the run has not saved its first.

    Raises:
        InputError: there is no complete checkpoint.
    """
    if load == LATEST:
        newest = next((folder for _, folder in complete_checkpoints(save_dir)), None)
        incomplete = [folder for _, folder in _checkpoints(save_dir)]
        incomplete = incomplete[: incomplete.index(newest)] if newest else incomplete
        for folder in incomplete:
            tell(f"--load latest: passing over {folder}, which is incomplete or damaged")
        if newest is None and any(folder.name[0] != "." for folder in incomplete):
            raise InputError(
                f"--load latest: no complete checkpoint in --save_dir {save_dir}; move the incomplete ones away to "
                "start a new run"
            )
        if newest is None:
            tell(f"--load latest: no checkpoint in --save_dir {save_dir} yet; a new run begins")
        return newest
    folder = Path(load)
    if not folder.exists():
        raise InputError(f"--load: {folder} does not exist; give a folder epochE-stepS, or 'latest'")
    if is_complete(folder):
        return folder
    if (folder / "config.json").is_file():
        raise InputError(
            f"--load: {folder} holds a Hugging Face model without training state; "
            "to start from its weights use --init_from (finetune.py: --model_path), for its sizes only use --config"
        )
    if (folder / MANIFEST).is_file() or (folder / RUNNING_STATES).is_file():
        raise InputError(f"--load: {folder} is an incomplete checkpoint; choose another, or 'latest'")
    raise InputError(f"--load: {folder} is not a checkpoint; give a folder epochE-stepS, or 'latest'")


def damaged_files(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Return the files of a checkpoint, or of one part of `parts`, whose size or checksum differs from the manifest."""
    manifest = _manifest(folder)
    if manifest is None:
        return [MANIFEST]
    damaged = []
    for name, expected in sorted(manifest.items())[part::parts]:
        try:
            if checksum(folder / name) != expected:
                damaged.append(name)
        except OSError:
            damaged.append(name)
    return damaged


def check_model(folder: Path, config: LlamaConfig, flag: str) -> None:
    """Raise InputError if a folder's config.json describes another model than `config`."""
    saved = load_config(str(folder))
    different = [key for key in MODEL_KEYS if getattr(saved, key) != getattr(config, key)]
    if not different and not rotates_alike(saved, config):  # as yarn and longrope do in another context
        keys = ("max_position_embeddings", "original_max_position_embeddings")
        different = [key for key in keys if getattr(saved, key, None) != getattr(config, key, None)]
    if different:
        listing = ", ".join(
            f"{key} {getattr(saved, key, None)} (not {getattr(config, key, None)})" for key in different
        )
        raise InputError(f"{flag}: {folder} holds another model than this run's: {listing}")


def read_running_states(folder: Path) -> dict:
    """Return a checkpoint's running states. Raises InputError if the file differs from the manifest."""
    path = folder / RUNNING_STATES
    if not _has_running_states(folder):
        raise InputError(f"--load: {path} is damaged; choose another checkpoint")
    return json.loads(path.read_text(encoding="utf-8"))


def _has_running_states(folder: Path) -> bool:
    """Return True if the file of the running states is as the manifest says."""
    return checksum(folder / RUNNING_STATES) == (_manifest(folder) or {}).get(RUNNING_STATES)
