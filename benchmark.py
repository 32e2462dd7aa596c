"""Measures the training step of a LLaMA on random tokens: time, throughput, TFLOPS and peak memory.

One GPU:
    python benchmark.py -c tiny -p zero2 -a
Eight GPUs of one machine:
    torchrun --standalone --nproc_per_node 8 benchmark.py -c 7b -p gemini -b 16 -g -a
What it would take, without a GPU:
    python benchmark.py -c 70b -p 3d --tp 4 --pp 2 -b 8 -g -a --dry_run --gpus 32
"""

from runtime import process, requirements

requirements.require()
requirements.start_cuda()

import argparse
import contextlib
import math
import os
import platform
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.booster import Booster
from colossalai.booster.plugin.plugin_base import Plugin
from colossalai.interface import ModelWrapper, OptimizerWrapper
from colossalai.legacy.utils.memory import colo_set_process_memory_fraction
from transformers import LlamaConfig

from attn import select_attention
from data_utils import RandomDataset
from engine.boost import boost, build_plugin
from engine.fsdp import FSDPPlugin
from engine.launch import launch, shut_down
from engine.layout import BENCHMARK_PLUGINS, Layout, describe_layout, resolve_layout
from engine.recomputation import recomputed_share
from engine.shards import initialize_weights
from engine.step import forward_backward, optimizer_step
from model_utils import MODEL_CONFIGS, count_parameters, load_config
from planning.memory import settle_recomputation
from planning.report import memory_remedies, say_plan
from planning.throughput import StepTimer, benchmark_figures
from runtime.console import InputError, RunError, rank, say
from runtime.files import write_json
from training.checks import validate_args
from training.flags import (
    ArgumentParser,
    add_compute_args,
    add_dry_run_args,
    add_plugin_args,
    settings,
    user_name,
    user_path,
)

REDPAJAMA_TOKENS = 1.2e12  # what a dry run plans to train on
MB = 2**20  # as in ColossalAI's published figures


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="benchmark.py", description=__doc__)
    parser.set_defaults(lr=3e-4, weight_decay=0.1, seed=42, accumulation_steps=1)  # the recipe's; they cost nothing
    work = parser.add_argument_group("model and batch")
    known = ", ".join(MODEL_CONFIGS)
    work.add_argument(
        "-c",
        "--config",
        type=user_name,
        default="7b",
        help=f"{known}, or a config.json or its folder (default: 7b)",
    )
    work.add_argument("-b", "--batch_size", type=int, default=2, help="sequences per data-parallel rank (default: 2)")
    work.add_argument("-l", "--max_length", type=int, default=4096, help="sequence length in tokens (default: 4096)")
    work.add_argument("-s", "--num_steps", type=int, default=5, help="optimizer steps to run (default: 5)")
    work.add_argument("-i", "--ignore_steps", type=int, default=2, help="the first of them, not counted (default: 2)")
    work.add_argument(
        "--gradient_clipping", type=float, default=1.0, help="largest gradient norm; 0: no clipping (default: 1.0)"
    )
    add_plugin_args(parser, BENCHMARK_PLUGINS)
    gemini = parser.add_argument_group("gemini and gemini_auto")
    gemini.add_argument("--extra_dp", type=int, default=1, help="copies of the sharded model (default: 1)")
    gemini.add_argument("--shard_param_frac", type=float, default=1.0, help="gemini: weights to shard (default: 1.0)")
    gemini.add_argument(
        "--offload_optim_frac", type=float, default=0.0, help="gemini: optimizer state on the host (default: 0.0)"
    )
    gemini.add_argument(
        "--offload_param_frac",
        type=float,
        default=0.0,
        help="gemini: weights on the host, if all optimizer state is (default: 0.0)",
    )
    gemini.add_argument(
        "-w",
        "--warmup_ratio",
        type=float,
        default=0.8,
        help="gemini_auto: GPU memory kept for activations in the first step (default: 0.8)",
    )
    add_compute_args(parser, precision="bf16")
    memory = parser.add_argument_group("limits and output")
    memory.add_argument("-x", "--xformers", dest="flash_attention", action="store_true", help="the same as -a")
    memory.add_argument("-m", "--memory_limit", type=int, help="GPU memory a process may take, in MB (default: all)")
    memory.add_argument("--json", type=user_path, help="write inputs and results to this file")
    memory.add_argument("--profile", type=user_path, help="folder for a trace of one more step, for chrome://tracing")
    add_dry_run_args(parser)
    return parser.parse_args(arguments)


def check_args(args: argparse.Namespace, config: LlamaConfig) -> None:
    """Checks what only the benchmark's flags have, then all that they share with the other programs'."""
    problems = [
        f"--{name}: {getattr(args, name)} is not between 0 and 1"
        for name in ("shard_param_frac", "offload_optim_frac", "offload_param_frac", "warmup_ratio")
        if not 0 <= getattr(args, name) <= 1
    ]
    if not problems:
        problems = gemini_problems(args)
    if args.num_steps <= args.ignore_steps:
        problems.append(
            f"--num_steps: {args.num_steps} leaves no step to count after --ignore_steps {args.ignore_steps}"
        )
    if args.json and not args.json.absolute().parent.is_dir():
        problems.append(f"--json: there is no folder {args.json.absolute().parent}")
    elif args.json and args.json.is_dir():
        problems.append(f"--json: {args.json} is a folder; give a file")
    elif args.json and not os.access(args.json.absolute().parent, os.W_OK | os.X_OK):
        problems.append(f"--json: no permission to write in {args.json.absolute().parent}; give another folder")
    if problems:
        raise InputError(*problems)
    validate_args(args, config)


def gemini_problems(args: argparse.Namespace) -> list[str]:
    """One line for each flag of Gemini that has no effect beside the others."""
    effects = (
        ("shard_param_frac", "gemini", 1),
        ("offload_optim_frac", "gemini", 0),
        ("offload_param_frac", "gemini", 0),
        ("warmup_ratio", "gemini_auto", 0.8),
    )
    problems = [
        f"--{name}: takes effect with -p {plugin} alone, not with -p {args.plugin}"
        for name, plugin, default in effects
        if args.plugin != plugin and getattr(args, name) != default
    ]
    if not problems and args.offload_param_frac and (args.shard_param_frac, args.offload_optim_frac) != (1, 1):
        problems.append(
            "--offload_param_frac: takes effect where all weights are sharded and all optimizer state is offloaded; "
            "give --offload_optim_frac 1 and leave --shard_param_frac out"
        )
    return problems


def gemini_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of Gemini as GeminiPlugin's arguments."""
    return dict(
        shard_param_frac=args.shard_param_frac,
        offload_optim_frac=args.offload_optim_frac,
        offload_param_frac=args.offload_param_frac,
        warmup_non_model_data_ratio=args.warmup_ratio,
    )


def limit_memory(megabytes: int) -> None:
    """Caps what this process may allocate on its GPU; Gemini's automatic placement then plans with that much."""
    if not torch.cuda.is_available():
        say("--memory_limit: there is no GPU whose memory it would limit")
        return
    total = torch.cuda.get_device_properties(get_accelerator().get_current_device()).total_memory
    colo_set_process_memory_fraction(min(1.0, megabytes * MB / total))


def batches(args: argparse.Namespace, config: LlamaConfig, layout: Layout, plugin: Plugin) -> Iterator[dict]:
    """This rank's random batches in the plugin's own data-parallel coordinate, one for each step."""
    dataset = RandomDataset(args.num_steps * args.batch_size * layout.dp, args.max_length, config.vocab_size, args.seed)
    return iter(plugin.prepare_dataloader(dataset, args.batch_size, shuffle=False, drop_last=True))


def announce(args: argparse.Namespace, config: LlamaConfig, layout: Layout, attention: str) -> None:
    say(f"model: {args.config}, {count_parameters(config):,} parameters, {args.mixed_precision}; {attention}")
    say(describe_layout(args.plugin, layout))
    sequences = args.batch_size * layout.dp
    say(
        f"global batch: {args.batch_size} x {layout.dp} data-parallel = {sequences} sequences x {args.max_length} "
        f"tokens = {sequences * args.max_length:,} tokens"
    )


@contextlib.contextmanager
def trace(folder: Path) -> Iterator[None]:
    """Writes what CPU and GPU do inside it to a file for each rank."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        yield
        get_accelerator().synchronize()
    profile.export_chrome_trace(str(folder / f"rank{dist.get_rank()}.json"))


def train_step(
    booster: Booster, model: ModelWrapper, optimizer: OptimizerWrapper, batch: dict, label_tokens: int
) -> tuple[torch.Tensor, float]:
    """One optimizer step, as in training; returns this rank's sum of token losses, and the gradient norm.

    Raises:
        RunError: the gradient is not finite, so that the figures would be of no model that trains.
    """
    loss_sum = forward_backward(booster, model, optimizer, [batch], label_tokens)
    grad_norm, skipped = optimizer_step(model, optimizer)
    if not (skipped or math.isfinite(grad_norm)):
        raise RunError(f"the gradient norm is {grad_norm}: what was timed is not training")
    return loss_sum, grad_norm


def total(per_rank: torch.Tensor) -> float:
    """The sum over all ranks. Collective."""
    summed = per_rank.detach().clone()
    dist.all_reduce(summed)
    return summed.item()


def slowest(step_seconds: list[float]) -> list[float]:
    """Each step's time on the rank that took longest. Collective."""
    device = get_accelerator().get_current_device()
    times = torch.tensor(step_seconds, dtype=torch.float64, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.tolist()


def peak_memory() -> dict[str, int]:
    """Bytes of the rank that took most: allocated by torch on the device, and resident on the host. Collective."""
    accelerator = get_accelerator()
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks = torch.tensor([accelerator.max_memory_allocated(), host], device=accelerator.get_current_device())
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    device, host = peaks.tolist()
    return {"peak_device_memory_bytes": device, "peak_host_memory_bytes": host}


def out_of_memory(args: argparse.Namespace, config: LlamaConfig) -> str:
    """One line: what the GPU held, and what would take less by the estimate."""
    return (
        f"out of GPU memory after {get_accelerator().max_memory_allocated() / MB:.2f} MB at the peak; what helps: "
        f"{memory_remedies(args, config)}; --dry_run shows what takes how much"
    )


def environment() -> dict[str, Any]:
    """Device, versions and commit of what was measured, so that a figure can be repeated."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": get_accelerator().get_device_name(),
        "commit": commit or None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: requirements.installed(name) for name in ("torch", "colossalai", "transformers", "flash_attn")},
    }


def report(args: argparse.Namespace, layout: Layout, results: dict) -> None:
    """Writes `--json`, and prints what was measured, the line of ColossalAI's published figures last."""
    if rank() == 0 and args.json:
        inputs = {name: str(value) if isinstance(value, Path) else value for name, value in settings(args).items()}
        document = {"inputs": inputs, "layout": asdict(layout) | {"gpus": layout.ranks}, **results}
        write_json(args.json, document)
    mfu = "" if results["mfu"] is None else f", MFU {results['mfu']:.1%}"
    say(
        f"step: median {results['step_seconds_median']:.3f} s, p10 {results['step_seconds_p10']:.3f}, "
        f"p90 {results['step_seconds_p90']:.3f}; {results['tokens_per_second']:,.0f} tokens/s, "
        f"{results['model_tflops_per_gpu']:.1f} model TFLOPS/GPU{mfu}"
    )
    say(
        f"max memory usage:  {results['peak_device_memory_bytes'] / MB:.2f} MB, "
        f"throughput:  {results['samples_per_second']:.2f} samples/s, TFLOPS/GPU:  {results['tflops_per_gpu']:.2f}"
    )


def main() -> int:
    args = parse_args()
    config = load_config(args.config)
    check_args(args, config)
    layout = resolve_layout(args, config)
    attention = select_attention(config, args.flash_attention, sequence_parallel=layout.sp > 1)
    settle_recomputation(args, config, layout)
    announce(args, config, layout, attention)
    if args.dry_run:
        say_plan(args, config, layout, args.batch_size * layout.dp * args.max_length, REDPAJAMA_TOKENS)
        return 0
    try:
        measure(args, config, layout)
    except torch.OutOfMemoryError as error:
        raise RunError(out_of_memory(args, config)) from error
    return 0


def measure(args: argparse.Namespace, config: LlamaConfig, layout: Layout) -> None:
    """Builds the model, times its steps, and reports."""
    launch(args.seed)
    if args.memory_limit:
        limit_memory(args.memory_limit)
    plugin = build_plugin(args, layout, config, **gemini_options(args))
    booster, model, optimizer = boost(args, config, plugin)
    if not isinstance(plugin, FSDPPlugin):
        initialize_weights(plugin, model, optimizer, config, args.seed)

    timer = StepTimer()
    label_tokens = args.batch_size * layout.dp * (args.max_length - 1)
    for batch in batches(args, config, layout, plugin):
        with timer.step():
            loss_sum, grad_norm = train_step(booster, model, optimizer, batch, label_tokens)
        loss = total(loss_sum) / layout.tp / label_tokens
        counted = "" if len(timer.seconds) > args.ignore_steps else ", not counted"
        say(f"step {len(timer.seconds)}/{args.num_steps}: {timer.seconds[-1]:.3f} s, loss {loss:.4f}{counted}")
    results = environment() | {"loss": loss, "grad_norm": grad_norm} | peak_memory()
    results |= benchmark_figures(
        config,
        slowest(timer.seconds[args.ignore_steps :]),
        sequences=args.batch_size * layout.dp,
        seq_length=args.max_length,
        gpus=layout.ranks,
        recomputation=recomputed_share(args),
        device_name=results["device"],
    )
    if args.profile:
        with trace(args.profile):
            train_step(booster, model, optimizer, batch, label_tokens)

    report(args, layout, results)
    shut_down(plugin)


if __name__ == "__main__":
    process.run(main, "benchmark.py")
