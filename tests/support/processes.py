"""Run a function of a test module on several ranks of a process group, each a real process."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from peft import LoraConfig
from transformers import LlamaConfig

from engine.boost import Engine, boost
from engine.job import DTYPES, Job
from engine.launch import launch
from engine.shards import MASTER, MOMENTS
from launching import free_port
from model_utils import ParameterSpec, initial_weight, load_config, parameter_specs
from pretrain import parse_args
from training.flags import job_of


def run_ranks(ranks: int, function: Callable, *arguments: Any) -> list[Any]:
    """Launch `ranks` ranks and return the value of `function(*arguments)` on each; raise the first exception."""
    port = free_port()
    method = "spawn" if torch.cuda.is_available() else "forkserver"  # a process with CUDA cannot be forked
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _run_rank, (ranks, port, folder, function, arguments), nprocs=ranks, start_method=method
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


def job(flags: str, adapters: LoraConfig | None = None, **changes: Any) -> Job:
    """Return the job that pretrain.py makes from these flags, for the model `test` with these changes.

    Args:
        adapters: as in `Job`.
        changes: fields of the model's configuration.
    """
    args = parse_args(["-c", "test", "-l", "64", "-x", "bf16", *flags.split()])
    args.extra_dp = 1  # as in benchmark.py, whose gemini takes --tp
    config = load_config(args.config)
    config.update({"torch_dtype": DTYPES[args.mixed_precision], **changes})
    asked = replace(job_of(args, config), adapters=adapters)
    assert asked.problems() == []
    return asked


def boosted(flags: str, adapters: LoraConfig | None = None, **changes: Any) -> Engine:
    """Return the engine that pretrain.py builds from these flags, its weights not yet set."""
    return boost(job(flags, adapters, **changes))


def random_states(config: LlamaConfig) -> dict[tuple[str, str], torch.Tensor]:
    """Return each parameter's full master weight and moments, always the same; weights as large as after training."""
    states = {}
    for name, shape in ((spec.name, spec.shape) for spec in parameter_specs(config)):
        for key in (MASTER, *MOMENTS):
            value = initial_weight(ParameterSpec(f"{name}.{key}.random", shape), config, 0, torch.device("cpu"))
            states[name, key] = value.square() if key in MOMENTS else 1 + value if "norm" in name else 4 * value
    return states
