#!/usr/bin/env bash
# Fine-tunes LLaMA-2 7B, or another model of its size, on instructions.
#
#   bash finetune_7B.sh --model_path MODEL -o SAVE_DIR [flags of finetune.py]
#
# Your flags override those below. BATCH_TOKENS=4194304 in the environment sets the tokens per optimizer step; the GPUs
# and flags then determine --accumulation_steps. With a hosts.txt next to this script, one host name per line, it runs
# on all of them. --help lists the other environment variables.
set -euo pipefail

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
prepare "$@"
set_batch 1 "$@"
launch finetune.py -p zero2 -x bf16 -a -g --lr 2e-5 "${batch_flags[@]}" "$@"
