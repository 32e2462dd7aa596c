#!/usr/bin/env bash
# LLaMA-2 7B with Gemini's automatic placement, for when gemini.sh runs out of memory: state that does not fit is
# offloaded to the host. 16 sequences of 4096 tokens per GPU, activation checkpointing.
#
#   bash gemini_auto.sh [flags of benchmark.py, which override those below]
#
# With a hosts.txt next to this script, one host name per line, it runs on all of them. --help lists the environment
# variables.
set -euo pipefail

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
prepare "$@"

launch benchmark.py -c 7b -p gemini_auto -b 16 -l 4096 -g -a "$@"
