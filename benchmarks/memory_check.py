"""Compare the memory that dry runs predict with the memory measured on one GPU, for a few layers of 7B's width.

    python benchmarks/memory_check.py    # zero2 and gemini, with and without -g, on this machine's GPU
    python benchmarks/memory_check.py --plugins hybrid_parallel fsdp --layers 8 --batch_size 1

Needs no data. Exits with status 1 if a prediction is off by more than --tolerance.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process

process.prepare()

import torch
from several_gpus import measure

import benchmark
from attn import select_attention
from model_utils import load_config
from planning.memory import estimate_memory
from runtime.console import InputError, RunError
from training.flags import job_of


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--plugins", nargs="+", default=["zero2", "gemini"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=0.1)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("no GPU found; run it on a machine with one")

    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("7b")
        config.num_hidden_layers = options.layers
        config.save_pretrained(folder)
        print(f"{options.layers} layers of 7B's width, {options.batch_size} x 4096 tokens, bf16; GB of 10^9 bytes")
        print(f"{'plugin':20}{'predicted':>10}{'measured':>10}{'off by':>8}{'MFU':>8}  at the peak")
        for plugin in options.plugins:
            for recompute in ([], ["-g"]):
                flags = ["-c", folder, "-p", plugin, "-b", str(options.batch_size), "-a", *recompute]
                select_attention(config, flash_attention=True)
                peak = estimate_memory(job_of(benchmark.parse_args(flags), config)).peak
                figures = measure(1, flags, Path(folder))
                if isinstance(figures, str):
                    raise RunError(figures)
                measured = figures["peak_device_memory_bytes"]
                off = peak.total / measured - 1
                wrong += abs(off) > options.tolerance
                mfu = "" if figures["mfu"] is None else f"{figures['mfu']:.1%}"
                print(
                    f"{' '.join([plugin, *recompute]):20}{peak.total / 1e9:10.2f}{measured / 1e9:10.2f}{off:+8.1%}"
                    f"{mfu:>8}  {peak.name}",
                    flush=True,
                )
    return int(wrong > 0)


if __name__ == "__main__":
    process.run(main, "memory_check.py")
