#!/usr/bin/env bash
# LLaMA-2 70B with Gemini: all state sharded over GPUs. 2 sequences of 4096 tokens per GPU, activation checkpointing.
#
#   bash gemini.sh [flags of benchmark.py, which override those below]
#
# With a hosts.txt next to this script, one host name per line, it runs on all of them. --help lists the environment
# variables.
set -euo pipefail

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
prepare "$@"

launch benchmark.py -c 70b -p gemini -b 2 -l 4096 -g -a "$@"
