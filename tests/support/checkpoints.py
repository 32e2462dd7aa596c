"""Checkpoints that have every file and no tensors."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig

from checkpointing.folder import MANIFEST, RUNNING_STATES, required_files, write_model_index
from model_utils import load_config
from runtime.files import checksum


def make_checkpoint(folder: Path, states: dict | None = None, config: LlamaConfig | None = None) -> Path:
    """Write a folder that passes for a complete checkpoint of a model, by default `test`."""
    config = config or load_config("test")
    config.torch_dtype = torch.bfloat16
    for name in required_files(config):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("content")
    write_model_index(folder / "model", config)
    (folder / RUNNING_STATES).write_text(json.dumps(states or {}))
    write_manifest(folder, required_files(config))
    return folder


def write_manifest(folder: Path, names: set[str]) -> None:
    """Write a manifest that lists these files as they are."""
    files = {name: checksum(folder / name) for name in sorted(names)}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
