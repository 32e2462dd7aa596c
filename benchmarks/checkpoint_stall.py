"""Measure how long training waits for a checkpoint, saved in the foreground and in the background.

    python benchmarks/checkpoint_stall.py -c tiny -p zero2 -x bf16 -b 4 -l 256 -o stall

Trains on random tokens: first some steps without a save, then in each round one save that training waits for and one
in the background while training goes on. Prints a line per save, then the medians.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import console, process, requirements

process.prepare()
requirements.start_cuda()

import shutil
import statistics
import time

import torch
import torch.distributed as dist

from attn import select_attention
from checkpointing.writer import CheckpointWriter, Retention
from engine import device
from engine.boost import boost
from engine.launch import launch, shut_down
from engine.shards import initialize_weights
from engine.step import forward_backward, optimizer_step
from model_utils import count_parameters, load_config
from runtime.console import say
from training.flags import ArgumentParser, add_flag, add_plugin_args, add_training_args, job_of


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("-c", "--config", default="tiny")
    add_flag(parser, "--rounds", 3, "number of saves of each kind")
    add_flag(parser, "--steps", 5, "optimizer steps timed without a save")
    add_plugin_args(parser)
    add_training_args(parser)
    args = parser.parse_args()
    config = load_config(args.config)
    say(select_attention(config, args.flash_attention, args.sp > 1, deterministic=args.deterministic))
    job = job_of(args, config)
    config.torch_dtype = job.dtype  # as it is saved
    launch(args.seed, args.deterministic)
    engine = boost(job)
    initialize_weights(engine)

    def train_step() -> float:
        """Take an optimizer step, and return its seconds."""
        started = time.perf_counter()
        ids = torch.randint(config.vocab_size, (args.batch_size, args.max_length))
        batch = {"input_ids": ids, "labels": ids}
        label_tokens = job.layout.dp * args.batch_size * (args.max_length - 1)
        forward_backward(engine, [batch], label_tokens)
        optimizer_step(engine)
        device.synchronize()
        dist.barrier()
        return time.perf_counter() - started

    def save(writer: CheckpointWriter, number: int) -> None:
        writer.save({"epoch": 0, "step": number, "adam_steps": 1})

    for _ in range(3):
        train_step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    quiet = [train_step() for _ in range(args.steps)]
    peak_before = device.peak_memory()
    keep_one = Retention(keep_checkpoints=1)
    foreground = CheckpointWriter(args.save_dir, engine, keep_one, background=False)
    background = CheckpointWriter(args.save_dir, engine, keep_one)
    background.allocate()
    rows = {"foreground": [], "background": []}
    during, number = [], 0
    gigabytes = count_parameters(config) * (job.dtype.itemsize + 12) / 1e9
    say(f"{count_parameters(config):,} parameters, {args.plugin} on {console.world_size()} ranks: {gigabytes:.2f} GB")
    for _ in range(args.rounds):
        for name, writer in (("foreground", foreground), ("background", background)):
            number += 1
            train_step()
            started = time.perf_counter()
            save(writer, number)
            if writer is foreground:
                writer.wait()
            stall = time.perf_counter() - started
            if writer is background:  # the next update waits until what it changes is copied
                stall += max(0.0, train_step() - statistics.median(quiet))
            while writer.writing:
                during.append(train_step())
            writer.wait()
            written = time.perf_counter() - started
            rows[name].append((stall, gigabytes / written))
            say(f"{name}: training waited {stall * 1000:.0f} ms, complete after {written:.1f} s")
    peak_after = device.peak_memory()

    say("\n| save | training waits, ms (first) | GB/s to disk |\n|---|---|---|")
    for name, values in rows.items():
        stalls, rates = zip(*values, strict=True)
        stall, rate = statistics.median(stalls[1:] or stalls), statistics.median(rates)
        say(f"| {name} | {stall * 1000:.0f} ({stalls[0] * 1000:.0f}) | {rate:.2f} |")
    say(
        f"step: {statistics.median(quiet) * 1000:.0f} ms, "
        f"{statistics.median(during or [float('nan')]) * 1000:.0f} ms while a checkpoint is written; "
        f"peak device memory {peak_before / 1e9:.3f} GB before, {peak_after / 1e9:.3f} GB with saves"
    )
    shut_down(engine.plugin)
    if console.rank() == 0:
        shutil.rmtree(args.save_dir)
    return 0


if __name__ == "__main__":
    process.run(main, "checkpoint_stall.py")
