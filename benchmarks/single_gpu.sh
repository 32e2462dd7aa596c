#!/usr/bin/env bash
# Trains a few steps of 7B's width with few layers under every plugin, one after another, on one GPU (or, for a trial,
# a small model on the CPU), and prints a table: tokens/s, MFU, step, peak memory. Further arguments go to benchmark.py.
#
#   bash benchmarks/single_gpu.sh
#   bash benchmarks/single_gpu.sh --no-compile
#   CONFIG=7b LAYERS=32 BATCH=2 PLUGINS=zero2 bash benchmarks/single_gpu.sh    # a GPU of 141 GB
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${LLAMA_PYTHON:-python}
config=${CONFIG:-7b} layers=${LAYERS:-8} batch=${BATCH:-4} steps=${STEPS:-12}
read -ra plugins <<<"${PLUGINS:-zero2 hybrid_parallel gemini zero2_cpu gemini_auto}"

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
"$python" - "$here/.." "$config" "$layers" "$results" <<'PYTHON'
import sys
sys.path.insert(0, sys.argv[1])
import console
console.quiet_third_parties()
from model_utils import load_config
config = load_config(sys.argv[2])
config.num_hidden_layers = int(sys.argv[3])
config.save_pretrained(sys.argv[4])
PYTHON

for plugin in "${plugins[@]}"; do
    layout=()
    if [[ $plugin == hybrid_parallel ]]; then layout=(--tp 1 --pp 1); fi
    "$python" "$here/../benchmark.py" -c "$results" -p "$plugin" -b "$batch" -a -s "$steps" -i 3 \
        "${layout[@]}" --json "$results/$plugin.json" "$@" >"$results/$plugin.log" 2>&1 ||
        { echo "single_gpu: $plugin failed:" && tail -n 3 "$results/$plugin.log"; } >&2
done

"$python" - "$results" "${plugins[@]}" <<'PYTHON'
import json, pathlib, sys
folder, *plugins = sys.argv[1:]
print("| plugin | tokens/s | MFU | median step, ms | peak GPU memory, GB |\n|---|---|---|---|---|")
for plugin in plugins:
    path = pathlib.Path(folder, f"{plugin}.json")
    if not path.is_file():
        print(f"| {plugin} | failed | | | |")
        continue
    result = json.loads(path.read_text())
    mfu = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
    step, peak = result["step_seconds_median"] * 1000, result["peak_device_memory_bytes"] / 1e9
    print(f"| {plugin} | {result['tokens_per_second']:,.0f} | {mfu} | {step:.0f} | {peak:.1f} |")
PYTHON
