#!/usr/bin/env bash
# Lints and tests, in the environment that scripts/setup.sh creates.
#
#   bash scripts/test.sh                             lint, then all tests
#   bash scripts/test.sh tests/unit/test_attn.py -x  only pytest, with these arguments
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [[ ${1:-} == --help ]]; then
    usage "${BASH_SOURCE[0]}"
    exit
fi

set_up --dev
export HF_HUB_OFFLINE=1  # tests bring their own data
export OMP_NUM_THREADS=1 # a test's processes share the cores

if (($# == 0)); then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m codespell_lib
    "$python" -m mypy
    PATH="$(dirname "$(command -v "$python")"):$PATH"
    if command -v shellcheck >/dev/null; then
        shellcheck --external-sources .ci/run benchmarks/*.sh scripts/*.sh scripts/*/*.sh scripts/*/*.sbatch
    fi
fi
"$python" -m pytest -q --timeout 900 "$@"
if (($# == 0)) && "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    "$python" -m pytest -q --timeout 900 -m gpu
fi
