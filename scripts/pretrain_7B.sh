#!/usr/bin/env bash
# Pretrains LLaMA-2 7B with the recipe: 4M tokens per optimizer step, learning rate 3e-4, ZeRO-2.
#
#   bash pretrain_7B.sh -d DATASET --tokenizer TOKENIZER -o SAVE_DIR [flags of pretrain.py]
#
# Your flags override those below. BATCH_TOKENS=4194304 in the environment sets the tokens per optimizer step; the GPUs
# and flags then determine --accumulation_steps. With a hosts.txt next to this script, one host name per line, it runs
# on all of them. --help lists the other environment variables.
set -euo pipefail

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
prepare "$@"
set_batch 1 "$@"
launch pretrain.py -c 7b -p zero2 -x bf16 -a -g --lr 3e-4 "${batch_flags[@]}" "$@"
