"""Runs a function of a test module on several ranks of one process group, each a real process."""

import multiprocessing
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from colossalai.booster import Booster
from colossalai.booster.plugin.plugin_base import Plugin
from colossalai.interface import ModelWrapper, OptimizerWrapper
from transformers import LlamaConfig

from engine.boost import DTYPES, boost, build_plugin
from engine.launch import launch
from engine.layout import layout_problems, resolve_layout
from engine.shards import MASTER, MOMENTS
from launching import free_port
from model_utils import ParameterSpec, initial_weight, load_config, parameter_specs
from pretrain import parse_args

# Ranks fork from a server that has imported the modules once, which takes longer than most of these tests.
multiprocessing.set_forkserver_preload(["pretrain"])


def run_ranks(ranks: int, function: Callable, *arguments: Any) -> list[Any]:
    """Return the values of `function(*arguments)` on each of `ranks` launched ranks; raise its first exception."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _run_rank, (ranks, port, folder, function, arguments), nprocs=ranks, start_method="forkserver"
        )
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(ranks)]


def _run_rank(rank: int, ranks: int, port: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    launch(seed=0)
    torch.save(function(*arguments), Path(folder, str(rank)))
    torch.distributed.barrier()
    os._exit(0)  # as process.run does, and for the same reason


@dataclass
class Boosted:
    """The model `test` inside a plugin, its weights not yet set."""

    args: Namespace
    config: LlamaConfig
    plugin: Plugin
    booster: Booster
    model: ModelWrapper
    optimizer: OptimizerWrapper


def boosted(flags: str, **changes: Any) -> Boosted:
    """Build what pretrain.py builds from these flags; `changes` are made to the configuration."""
    args = parse_args(["-c", "test", "-l", "64", "-x", "bf16", *flags.split()])
    config = load_config("test")
    config.update(changes)
    config.torch_dtype = DTYPES[args.mixed_precision]
    assert layout_problems(args, config) == []
    plugin = build_plugin(args, resolve_layout(args, config), config)
    return Boosted(args, config, plugin, *boost(args, config, plugin))


def random_states(config: LlamaConfig) -> dict[tuple[str, str], torch.Tensor]:
    """A full master weight and moments of each parameter, always the same; weights like those of a trained model."""
    states = {}
    for name, shape in ((spec.name, spec.shape) for spec in parameter_specs(config)):
        for key in (MASTER, *MOMENTS):
            value = initial_weight(ParameterSpec(f"{name}.{key}.random", shape), config, 0, torch.device("cpu"))
            states[name, key] = value.square() if key in MOMENTS else 1 + value if "norm" in name else 4 * value
    return states
