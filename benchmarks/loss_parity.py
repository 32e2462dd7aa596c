"""Train the same model on the same data in several layouts, and compare the losses with the first layout's.

    python benchmarks/loss_parity.py -d sample/data --tokenizer sample/tokenizer "1 zero2" "2 gemini" \\
        "2 hybrid_parallel --tp 2 --pp 1"

A layout is a number of GPUs (CPU processes on a machine without GPU), a plugin, and further flags of pretrain.py. Each
step has the same sequences in every layout. Differences are relative.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime import process

process.prepare()

import numpy as np
from several_gpus import launched

import pretrain
from model_utils import load_config
from runtime.console import InputError, RunError
from training.flags import job_of


def losses(layout: str, common: list[str], sequences: int, folder: Path) -> np.ndarray:
    """Run a layout, and return the loss of each step.

    Raises:
        InputError: `sequences` is not divisible by the micro-batches of a step.
        RunError: the run failed.
    """
    gpus, plugin, *flags = layout.split()
    flags = [*common, "-p", plugin, *flags]
    args = pretrain.parse_args([*flags, "--dry_run", "--gpus", gpus])
    parts = job_of(args, load_config(args.config)).layout.dp * args.accumulation_steps
    if sequences % parts:
        raise InputError(
            f"--sequences: {sequences} is not divisible by the {parts} micro-batches of a step of '{layout}'"
        )
    flags += ["-b", str(sequences // parts), "-o", str(folder / "checkpoint"), "-t", str(folder / "logs")]
    done = launched("pretrain.py", int(gpus), flags)
    if done.returncode:
        raise RunError("\n".join([f"'{layout}' failed:", *done.stdout.splitlines()[-20:]]))
    rows = (folder / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(row)["loss"] for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="+")
    parser.add_argument("-d", "--dataset", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("-c", "--config", default="tiny")
    parser.add_argument("-l", "--max_length", default="256")
    parser.add_argument("--sequences", type=int, default=16, help="sequences per step, over all ranks (default: 16)")
    parser.add_argument("--max_steps", default="100")
    parser.add_argument("--lr", default="1e-3")
    parser.add_argument("--seed", default="42")
    args = parser.parse_args()
    common = ["-d", args.dataset, "--tokenizer", args.tokenizer, "-c", args.config, "-l", args.max_length]
    common += ["--max_steps", args.max_steps, "--lr", args.lr, "--seed", args.seed, "-x", "bf16", "-s", "10"]

    print("| layout | median difference | 95th percentile | largest | at step | last loss |")
    print("|---|---|---|---|---|---|", flush=True)
    reference: np.ndarray | None = None
    for layout in args.layouts:
        with tempfile.TemporaryDirectory() as folder:
            found = losses(layout, common, args.sequences, Path(folder))
        reference = found if reference is None else reference
        off = np.abs(found / reference - 1)
        figures = f"{np.median(off):.3%} | {np.percentile(off, 95):.3%} | {off.max():.3%} | {off.argmax() + 1}"
        print(f"| `{layout}` | {figures} | {found[-1]:.4f} |", flush=True)
    return 0


if __name__ == "__main__":
    process.run(main, "loss_parity.py")
