#!/usr/bin/env bash
# Time a few layers of 7B's width with every plugin on one GPU (or, to try it out, a small model on the CPU), and print
# tokens/s, MFU, step time and peak memory as a table. Arguments go to benchmark.py.
#
#   bash benchmarks/single_gpu.sh
#   bash benchmarks/single_gpu.sh --no-compile
#   CONFIG=7b LAYERS=32 BATCH=2 PLUGINS=zero2 bash benchmarks/single_gpu.sh    # a GPU of 141 GB
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -ra layouts <<<"${PLUGINS:-zero2 hybrid_parallel gemini zero2_cpu gemini_auto}"
exec "${LLAMA_PYTHON:-python}" "$here/several_gpus.py" "${layouts[@]/%hybrid_parallel/hybrid_parallel --tp 1 --pp 1}" \
    --gpus 1 -c "${CONFIG:-7b}" --layers "${LAYERS:-8}" -b "${BATCH:-4}" -s "${STEPS:-12}" -- "$@"
