"""Measure the training step of a LLaMA model on random tokens: time, throughput, TFLOPS and peak memory.

One GPU:
    python benchmark.py -c tiny -p zero2 -a
Eight GPUs of one machine:
    torchrun --standalone --nproc_per_node 8 benchmark.py -c 7b -p gemini -b 16 -g -a
Estimate memory and time without a GPU:
    python benchmark.py -c 70b -p 3d --tp 4 --pp 2 -b 8 -g -a --dry_run --gpus 32
"""

from runtime import process, requirements

requirements.require()
requirements.start_cuda()

import argparse
import contextlib
import math
import platform
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from attn import select_attention
from data_utils import RandomDataset
from engine import device, float8
from engine.boost import Engine, boost
from engine.device import MB
from engine.job import Job, Optimization, Placement
from engine.launch import launch, shut_down
from engine.layout import describe_layout
from engine.shards import initialize_weights
from engine.step import forward_backward, optimizer_step
from model_utils import MODEL_CONFIGS, count_parameters, load_config
from planning.machines import DryRun, planned_machines
from planning.memory import settle
from planning.report import memory_remedies, say_plan
from planning.step_time import estimate_step
from planning.throughput import StepTimer, benchmark_figures
from runtime.console import RunError, below, local_world_size, rank, say
from runtime.files import file_problems, write_json
from training.checks import check_job, folder_problems
from training.flags import (
    ArgumentParser,
    add_compute_args,
    add_dry_run_args,
    add_flag,
    add_plugin_args,
    job_of,
    settings,
    take,
    user_name,
    user_path,
)

REDPAJAMA_TOKENS = 1.2e12  # that a dry run plans to train on


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="benchmark.py", description=__doc__)
    unset = vars(Optimization()) | dict(seed=42, accumulation_steps=1)
    parser.set_defaults(**unset)  # no effect on speed
    work = parser.add_argument_group("model and batch")
    known = ", ".join(MODEL_CONFIGS)
    add_flag(work, "-c --config", "7b", f"{known}, or a config.json or its folder", type=user_name)
    add_flag(work, "-b --batch_size", 2, "sequences per data-parallel rank")
    add_flag(work, "-l --max_length", 4096, "sequence length in tokens")
    add_flag(work, "-s --num_steps", 5, "optimizer steps to run")
    add_flag(work, "-i --ignore_steps", 2, "first steps, which do not count")
    add_flag(work, "--gradient_clipping", 1.0, "maximum gradient norm; 0: no clipping")
    add_plugin_args(parser, all_plugins=True)
    gemini = parser.add_argument_group("gemini and gemini_auto")
    add_flag(gemini, "--extra_dp", 1, "copies of the sharded model")
    add_flag(gemini, "--shard_param_frac", 1.0, "gemini: fraction of weights to shard")
    add_flag(gemini, "--offload_optim_frac", 0.0, "gemini: fraction of the optimizer state offloaded")
    text = "gemini: fraction of the weights offloaded, if all optimizer state is"
    add_flag(gemini, "--offload_param_frac", 0.0, text)
    text = "gemini_auto: GPU memory kept for activations in the first step"
    add_flag(gemini, "-w --warmup_ratio", 0.8, text)
    add_compute_args(parser, precision="bf16")
    memory = parser.add_argument_group("limits and output")
    add_flag(memory, "-x --xformers", False, "the same as -a", dest="flash_attention")
    add_flag(memory, "-m --memory_limit", int, "MB of GPU memory that a process may use (default: all)")
    add_flag(memory, "--json", user_path, "file for inputs and results")
    add_flag(memory, "--profile", user_path, "folder for traces of one more step, for chrome://tracing")
    add_dry_run_args(parser)
    return parser.parse_args(arguments)


def load_job(args: argparse.Namespace, layers: int | None = None) -> tuple[Job, str]:
    """Return the job that flags describe, of this program or pretrain.py, and a line on its attention kernel.

    Args:
        layers: number of layers; None: that of the model.

    Raises:
        InputError: the configuration cannot be read, or flags contradict each other.
    """
    config = load_config(args.config)
    config.num_hidden_layers = layers or config.num_hidden_layers
    attention = select_attention(
        config, args.flash_attention, sequence_parallel=args.sp > 1, deterministic=args.deterministic
    )
    return job_of(args, config), attention


def check(args: argparse.Namespace, job: Job) -> None:
    """Check every flag before a GPU is touched. Raises InputError with one line per problem."""
    problems = placement_problems(job)
    problems += below(1, memory_limit=args.memory_limit)
    problems += below(0, ignore_steps=args.ignore_steps)
    if args.num_steps <= args.ignore_steps:
        problems.append(
            f"--num_steps: {args.num_steps} leaves no step to count after --ignore_steps {args.ignore_steps}"
        )
    if args.json:
        problems += file_problems("--json", args.json)
    if args.profile:
        problems += folder_problems("--profile", args.profile)
    plan = take(DryRun, args)
    if plan.facts and not plan.dry_run:
        problems += plan.facts_problems(job.compute.fp8)
    # Outside of a dry run the facts give the estimate beside the measured step.
    check_job(job, plan if plan.dry_run else replace(plan, facts=None), args.given, further=problems)


def placement_problems(job: Job) -> list[str]:
    """Return a line for each flag of Gemini that is not a fraction, or has no effect with the others."""
    placement, plugin = job.placement, job.parallelism.plugin
    problems = [
        f"--{name}: must be between 0 and 1, not {value}"
        for name, value in vars(placement).items()
        if not 0 <= value <= 1
    ]
    if problems:
        return problems
    default = Placement()
    for name, value in vars(placement).items():
        wanted = "gemini_auto" if name == "warmup_ratio" else "gemini"
        if plugin != wanted and value != getattr(default, name):
            problems.append(f"--{name}: takes effect only with -p {wanted}, not with -p {plugin}")
    whole = (placement.shard_param_frac, placement.offload_optim_frac) == (1, 1)
    if not problems and placement.offload_param_frac and not whole:
        problems.append(
            "--offload_param_frac: takes effect where all weights are sharded and all optimizer state is offloaded; "
            "give --offload_optim_frac 1 and leave --shard_param_frac out"
        )
    return problems


def batches(engine: Engine, num_steps: int) -> Iterator[dict]:
    """Return this rank's random batches, one per step, split by the plugin's data-parallel coordinate."""
    batch, vocabulary = engine.job.batch, engine.config.vocab_size
    sequences = num_steps * batch.batch_size * engine.layout.dp
    dataset = RandomDataset(sequences, batch.max_length, vocabulary, engine.job.seed)
    return iter(engine.plugin.prepare_dataloader(dataset, batch.batch_size, shuffle=False, drop_last=True))


def announce(model: str, job: Job, attention: str, on_gpu: bool) -> None:
    """Print the model, the layout and the global batch."""
    parameters, batch, layout = count_parameters(job.config), job.batch, job.layout
    say(f"model: {model}, {parameters:,} parameters, {float8.describe(job, on_gpu)}; {attention}")
    say(describe_layout(layout))
    sequences = batch.batch_size * layout.dp
    say(
        f"global batch: {batch.batch_size} x {layout.dp} data-parallel = {sequences} sequences x {batch.max_length} "
        f"tokens = {sequences * batch.max_length:,} tokens"
    )


@contextlib.contextmanager
def trace(folder: Path) -> Iterator[None]:
    """Write a trace of CPU and GPU activity in the context, one file per rank."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        yield
        device.synchronize()
    profile.export_chrome_trace(str(folder / f"rank{dist.get_rank()}.json"))


def train_step(engine: Engine, batch: dict, label_tokens: int) -> tuple[torch.Tensor, float]:
    """Run one optimizer step as in training; return this rank's sum of token losses and the gradient norm.

    Raises:
        RunError: the gradient is not finite, so the figures would not be those of training.
    """
    loss_sum = forward_backward(engine, [batch], label_tokens)
    grad_norm, skipped = optimizer_step(engine)
    if not (skipped or math.isfinite(grad_norm)):
        raise RunError(f"the gradient norm is {grad_norm}, so the step timed is not one of training")
    return loss_sum, grad_norm


def total(per_rank: torch.Tensor) -> float:
    """Return the sum over all ranks. Collective."""
    summed = per_rank.detach().clone()
    dist.all_reduce(summed)
    return summed.item()


def slowest(step_seconds: list[float]) -> list[float]:
    """Return each step's time on its slowest rank. Collective."""
    times = torch.tensor(step_seconds, dtype=torch.float64, device=device.current_device())
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.tolist()


def peak_memory() -> dict[str, int]:
    """Return the highest peaks of any rank in bytes: torch's on the device, resident on the host. Collective."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks = torch.tensor([device.peak_memory(), host], device=device.current_device())
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    on_device, host = peaks.tolist()
    return {"peak_device_memory_bytes": on_device, "peak_host_memory_bytes": host}


def environment() -> dict[str, Any]:
    """Return the device, versions and commit, so that a figure can be reproduced."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": device.device_name(),
        "commit": commit or None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: requirements.installed(name) for name in ("torch", "colossalai", "transformers", "flash_attn")},
    }


def report(args: argparse.Namespace, job: Job, results: dict) -> None:
    """Write `--json` and print the results; the last line has the format of ColossalAI's published figures."""
    if rank() == 0 and args.json:
        values = settings(args) | asdict(job.compute)
        inputs = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        layout = asdict(job.layout) | {"gpus": job.layout.ranks}
        write_json(args.json, {"inputs": inputs, "layout": layout, **results})
    mfu = "" if results["mfu"] is None else f", MFU {results['mfu']:.1%}"
    if results["float8_utilization"] and job.compute.fp8:
        mfu += f" of the bf16 peak, {results['float8_utilization']:.1%} of the float8 peak"
    estimate = results["step_seconds_estimated"]
    estimated = f" (estimated {estimate:.3f})" if estimate else ""
    say(
        f"step: median {results['step_seconds_median']:.3f} s{estimated}, p10 {results['step_seconds_p10']:.3f}, "
        f"p90 {results['step_seconds_p90']:.3f}; {results['tokens_per_second']:,.0f} tokens/s, "
        f"{results['model_tflops_per_gpu']:.1f} model TFLOPS/GPU{mfu}"
    )
    say(
        f"max memory usage:  {results['peak_device_memory_bytes'] / MB:.2f} MB, "
        f"throughput:  {results['samples_per_second']:.2f} samples/s, TFLOPS/GPU:  {results['tflops_per_gpu']:.2f}"
    )


def main() -> int:
    args = parse_args()
    plan, (job, attention) = take(DryRun, args), load_job(args)
    check(args, job)
    job = settle(job, plan)
    announce(args.config, job, attention, on_gpu=args.dry_run or torch.cuda.is_available())
    if args.dry_run:
        say_plan(job, plan, job.tokens_per_step, REDPAJAMA_TOKENS)
        return 0
    try:
        measure(args, job, plan)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of GPU memory after {device.peak_memory() / MB:.2f} MB at the peak; what helps: "
            f"{memory_remedies(job, plan)}; --dry_run shows the memory by component"
        ) from error
    return 0


def measure(args: argparse.Namespace, job: Job, plan: DryRun) -> None:
    """Build the model, time its steps and report them."""
    launch(job.seed, job.compute.deterministic)
    if args.memory_limit and not device.limit_memory(args.memory_limit):
        say("--memory_limit: no effect without a GPU")
    engine = boost(job)
    initialize_weights(engine)

    timer, sequences = StepTimer(), job.batch.batch_size * job.layout.dp
    label_tokens = sequences * (job.batch.max_length - 1)
    for batch in batches(engine, args.num_steps):
        with timer.step():
            loss_sum, grad_norm = train_step(engine, batch, label_tokens)
        loss = total(loss_sum) / job.layout.tp / label_tokens
        counted = "" if len(timer.seconds) > args.ignore_steps else ", not counted"
        say(f"step {len(timer.seconds)}/{args.num_steps}: {timer.seconds[-1]:.3f} s, loss {loss:.4f}{counted}")
    results = environment() | {"loss": loss, "grad_norm": grad_norm} | peak_memory()
    results |= benchmark_figures(
        job.config,
        slowest(timer.seconds[args.ignore_steps :]),
        sequences=sequences,
        seq_length=job.batch.max_length,
        gpus=job.layout.ranks,
        recomputation=job.recomputed,
        device_name=results["device"],
    )
    known = torch.cuda.is_available() or plan.facts
    machines = planned_machines(replace(plan, gpus_per_node=local_world_size())) if known else None
    results["step_seconds_estimated"] = estimate_step(job, machines).total if machines else None
    if args.profile:
        with trace(args.profile):
            train_step(engine, batch, label_tokens)

    report(args, job, results)
    shut_down(engine.plugin)


if __name__ == "__main__":
    process.run(main, "benchmark.py")
