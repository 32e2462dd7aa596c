#!/usr/bin/env bash
# Installs the packages, makes a small sample corpus, and pretrains a small LLaMA on it in a few minutes, on all GPUs of
# this machine or on its CPU. Everything is written to quickstart/ in the repository, except the tokenized corpus, which
# pretrain.py keeps in ~/.cache/llama-training.
#
#   bash scripts/quickstart.sh
#
# A second run reuses the installation and the corpus, and trains again. Environment: see scripts/setup.sh --help
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if (($# > 0)); then
    usage "${BASH_SOURCE[0]}"
    [[ $1 == -h || $1 == --help ]] && exit 0
    exit 2
fi

set_up
export HF_HUB_OFFLINE=1 # everything is local

"$python" scripts/make_sample_data.py --output_dir quickstart

launch=("$python")
if command -v nvidia-smi >/dev/null; then
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    if ((gpus > 0)); then
        launch+=(-m torch.distributed.run --standalone --nproc_per_node "$gpus")
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun sets it, with a four-line warning
    fi
fi
command=("${launch[@]}" pretrain.py
    -c tiny -p zero2 -d quickstart/data --tokenizer quickstart/tokenizer
    -x fp32 -b 8 -l 256 --lr 3e-3 -s 20 --max_steps 400 -i 200
    -o quickstart/checkpoint -t quickstart/tb_logs)

if [[ -e quickstart/checkpoint || -e quickstart/tb_logs ]]; then
    echo "quickstart: removing the last quickstart's checkpoints and logs"
    rm -rf quickstart/checkpoint quickstart/tb_logs
fi
echo "quickstart: running, in $PWD:"
printf '\n   '
printf ' %q' "${command[@]}"
printf '\n\n'
"${command[@]}"

"$python" - quickstart/tb_logs/metrics.jsonl <<'PY'
import json
import sys
losses = [json.loads(line)["loss"] for line in open(sys.argv[1])]
end = sum(losses[-20:]) / 20
print(f"\nquickstart: loss {losses[0]:.2f} at step 1, {end:.2f} averaged over the last 20 of {len(losses)} steps")
PY
cat <<TEXT
quickstart: checkpoints    quickstart/checkpoint
quickstart: final model    quickstart/checkpoint/final
quickstart: TensorBoard    $python -m tensorboard.main --logdir quickstart/tb_logs
quickstart: the model continues "Return the":
TEXT
"$python" scripts/generate.py --model quickstart/checkpoint/final --prompt "Return the"
