#!/usr/bin/env bash
# LLaMA-2 70B, each layer split over 4 GPUs, the layers over 2 stages: needs a multiple of 8 GPUs. 8 sequences of 4096
# tokens a data-parallel rank, activations recomputed.
#
#   bash 3d.sh [flags of benchmark.py, which win over those below]
#
# hosts.txt beside this script, one host name a line, makes it run on all of them. --help lists the variables of the
# environment.
set -euo pipefail

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
prepare "$@"

launch benchmark.py -c 70b -p 3d --tp 4 --pp 2 -b 8 -l 4096 -g -a "$@"
