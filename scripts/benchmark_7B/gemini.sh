#!/usr/bin/env bash
# LLaMA-2 7B with Gemini: all state sharded over the GPUs. 16 sequences of 4096 tokens a GPU, activations recomputed.
#
#   bash gemini.sh [flags of benchmark.py, which win over those below]
#
# hosts.txt beside this script, one host name a line, makes it run on all of them. --help lists the variables of the
# environment.
set -euo pipefail

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
prepare "$@"

launch benchmark.py -c 7b -p gemini -b 16 -l 4096 -g -a "$@"
