#!/usr/bin/env bash
# Pretrains LLaMA-2 70B with the recipe: 4M tokens per optimizer step, learning rate 1.5e-4, tensor parallelism over 4
# GPUs, 2 pipeline stages.
#
#   bash pretrain_70B.sh -d DATASET --tokenizer TOKENIZER -o SAVE_DIR [flags of pretrain.py]
#
# Your flags override those below. BATCH_TOKENS=4194304 in the environment sets the tokens per optimizer step; the GPUs
# and flags then determine --accumulation_steps. With a hosts.txt next to this script, one host name per line, it runs
# on all of them. --help lists the other environment variables.
set -euo pipefail

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
prepare "$@"
tp=$(flag_value 4 --tp --tp "$@")
pp=$(flag_value 2 --pp --pp "$@")
check_number --tp "$tp" 1
check_number --pp "$pp" 1
set_batch "$((tp * pp))" "$@"
launch pretrain.py -c 70b -p hybrid_parallel --tp "$tp" --pp "$pp" -x bf16 -a -g --lr 1.5e-4 "${batch_flags[@]}" "$@"
