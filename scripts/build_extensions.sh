#!/usr/bin/env bash
# Compiles ColossalAI's two extensions for Adam ahead of the first run, which would otherwise do so: about 2 minutes.
#
#   bash scripts/build_extensions.sh
#   HOSTFILE=hosts.txt bash scripts/build_extensions.sh   on every host of a hosts file at once
#
# The result stays in ~/.cache/colossalai of each machine. Where it is compiled already, or there is no GPU, this ends
# at once and says so, with status 0.
set -euo pipefail

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

NPROC_PER_NODE=1 # one process compiles
prepare "$@"
launch scripts/doctor.py --build_extensions
