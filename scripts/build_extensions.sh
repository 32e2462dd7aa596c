#!/usr/bin/env bash
# Compiles ColossalAI's two extensions for Adam before the first run, which would otherwise do it: about 2 minutes.
#
#   bash scripts/build_extensions.sh
#   HOSTFILE=hosts.txt bash scripts/build_extensions.sh   on every host of a hosts file at once
#
# The result is kept in ~/.cache/colossalai on each machine. If it exists already, or there is no GPU, the script says
# so and ends with status 0.
set -euo pipefail

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

NPROC_PER_NODE=1 # one process compiles
prepare "$@"
launch scripts/doctor.py --build_extensions
