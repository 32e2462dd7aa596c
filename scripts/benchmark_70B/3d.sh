#!/usr/bin/env bash
# LLaMA-2 70B with tensor parallelism over 4 GPUs and 2 pipeline stages: needs a multiple of 8 GPUs. 8 sequences of 4096
# tokens per data-parallel rank, activation checkpointing.
#
#   bash 3d.sh [flags of benchmark.py, which override those below]
#
# With a hosts.txt next to this script, one host name per line, it runs on all of them. --help lists the environment
# variables.
set -euo pipefail

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
prepare "$@"

launch benchmark.py -c 70b -p 3d --tp 4 --pp 2 --zero 1 -b 8 -l 4096 -g -a "$@"
