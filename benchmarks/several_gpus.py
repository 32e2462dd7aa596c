"""Run benchmark.py on 1, 2, 4 ... GPUs of this machine with constant work per GPU, and print a table.

    python benchmarks/several_gpus.py --gpus 1 2 4 8
    python benchmarks/several_gpus.py "3d --tp 2 -b 8" "3d --pp 2 -b 16" "3d --sp 2 -b 8" --gpus 2

A layout is a plugin with flags of benchmark.py; flags after `--` apply to all layouts. `efficiency` is tokens/s per GPU
relative to the same layout on the fewest GPUs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime import process

process.prepare()

from model_utils import load_config


def launched(program: str, gpus: int, flags: list[str]) -> subprocess.CompletedProcess:
    """Run a program on `gpus` GPUs to its end; `stdout` of the result holds output and errors."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)] if gpus > 1 else []
    command = [sys.executable, *launcher, str(ROOT / program), *flags]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def measure(gpus: int, flags: list[str], folder: Path) -> dict | str:
    """Return the results of benchmark.py from --json, or its error message."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    done = launched("benchmark.py", gpus, [*flags, "--json", str(result)])
    if result.is_file():
        return json.loads(result.read_text())
    errors = [line for line in done.stdout.splitlines() if line.startswith("benchmark.py:")]
    return errors[-1] if errors else done.stdout[-2000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", default=["zero2", "gemini"], help="default: zero2 gemini")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("-c", "--config", default="7b")
    parser.add_argument("--layers", type=int, default=8, help="number of layers (default: 8)")
    parser.add_argument("-b", "--batch_size", default="4")
    parser.add_argument("-s", "--num_steps", default="12")
    own, further = sys.argv[1:], []
    if "--" in own:
        own, further = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)

    print("| GPUs | layout | tokens/s | per GPU | efficiency | MFU | median step, ms | peak GPU memory, GB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(args.config)
        config.num_hidden_layers = args.layers
        config.save_pretrained(folder)
        common = ["-c", folder, "-b", args.batch_size, "-s", args.num_steps, "-i", "3", "-a", *further]
        for layout in args.layouts:
            plugin, *flags = layout.split()
            for gpus in sorted(args.gpus):
                result = measure(gpus, [*common, "-p", plugin, *flags], Path(folder))
                if isinstance(result, str):
                    print(f"| {gpus} | {layout} | {result} | | | | | |", flush=True)
                    continue
                tokens = result["tokens_per_second"]
                efficiency = tokens / gpus / first.setdefault(layout, tokens / gpus)
                mfu = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
                step, peak = result["step_seconds_median"] * 1000, result["peak_device_memory_bytes"] / 1e9
                print(
                    f"| {gpus} | {layout} | {tokens:,.0f} | {tokens / gpus:,.0f} | {efficiency:.1%} | {mfu} "
                    f"| {step:.0f} | {peak:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
