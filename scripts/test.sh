#!/usr/bin/env bash
# Lints and tests, in the environment that scripts/setup.sh creates.
#
#   bash scripts/test.sh                             lint, then all tests
#   bash scripts/test.sh --fast                      lint, then the unit tests that take little time
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

fast=
if [[ $* == --fast ]]; then
    fast=1
    shift
fi
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
if (($# > 0)); then
    exec "$python" -m pytest -q --timeout 900 "$@"
fi
# Tests of one file stay together, since they share what a fixture has trained.
parallel=(-n auto --maxprocesses 4 --dist loadfile)
if [[ $fast ]]; then
    exec "$python" -m pytest -q --timeout 900 "${parallel[@]}" -m "not slow and not matrix and not gpu" tests/unit
fi
"$python" -m pytest -q --timeout 900 "${parallel[@]}"
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    "$python" -m pytest -q --timeout 900 -m gpu
fi
