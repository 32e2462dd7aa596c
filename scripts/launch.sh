#!/usr/bin/env bash
# shellcheck disable=SC2034 # the calling script uses the variables
# Starts a program of this repository on one machine, or on every host in a hosts file. Other scripts source it:
#
#   source .../launch.sh
#   prepare "$@"              # --help; sets python, hosts, nproc_per_node and processes
#   launch pretrain.py FLAGS "$@"
#
# Environment:
#   HOSTFILE=/path/hosts.txt    one host name or user@name per line; # begins a comment (default: hosts.txt next to the
#                               script; without it, this machine alone)
#   NPROC_PER_NODE=8            processes per machine, one for each GPU (default: its GPUs; 1 without a GPU)
#   MASTER_ADDR=node1           several machines: the host of rank 0 (default: the first host)
#   MASTER_PORT=29500           several machines: a free port on that host
#   SSH_PORT=22                 several machines: the port of their ssh servers
#   MAX_RESTARTS=500            start a failed run again, up to this often, from its newest checkpoint (default: 0)
#   SPARE_HOSTS=1               several machines: keep the file's last hosts for the place of those that fail (default: 0)
#   LLAMA_PYTHON=/path/python   the interpreter (default: .venv's, which scripts/setup.sh creates, else python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"

# Ends with status 2 unless a variable's value is a whole number of at least LEAST.
check_number() { # NAME VALUE LEAST
    [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] && (($2 >= $3)) && return
    (fail "$1: must be a whole number of at least $3, not '$2'") || exit 2
}

find_python() {
    if [[ -n ${LLAMA_PYTHON:-} ]]; then
        check_given_python
        python=$LLAMA_PYTHON
    elif [[ -x $root/.venv/bin/python ]]; then
        python=$root/.venv/bin/python
    else
        python=python3
        "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("colossalai"))' 2>/dev/null ||
            fail "ColossalAI is not installed; run: bash $root/scripts/setup.sh"
    fi
    python=$(command -v "$python")
}

# Sets hosts (the number of machines) and first_host.
read_hostfile() {
    local beside
    beside=$(cd "$(dirname "$0")" && pwd)/hosts.txt
    hosts=1
    if [[ -z ${HOSTFILE:-} ]]; then
        [[ -e $beside ]] || return 0
        HOSTFILE=$beside
    fi
    [[ -f $HOSTFILE && -r $HOSTFILE ]] ||
        fail "HOSTFILE: there is no file '$HOSTFILE'; write one host name per line into it, or unset HOSTFILE"
    local names
    names=$("$python" "$root/scripts/run_on_hosts.py" --list_hosts "$HOSTFILE") || fail "HOSTFILE: $names"
    hosts=$(wc -l <<<"$names")
    first_host=${names%%$'\n'*}
}

# Sets nproc_per_node.
count_processes() {
    local gpus=0
    if command -v nvidia-smi >/dev/null; then
        gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    fi
    nproc_per_node=${NPROC_PER_NODE:-}
    if [[ -z $nproc_per_node ]]; then
        if [[ -n ${HOSTFILE:-} ]] && ((gpus == 0)); then
            fail "NPROC_PER_NODE: cannot be derived, since this machine has no GPU; set it to the processes per host"
        fi
        nproc_per_node=$((gpus > 0 ? gpus : 1))
    fi
    check_number NPROC_PER_NODE "$nproc_per_node" 1
    if [[ -z ${HOSTFILE:-} ]] && ((gpus > 0 && nproc_per_node > gpus)); then
        fail "NPROC_PER_NODE: $nproc_per_node processes need as many GPUs, but this machine has $gpus"
    fi
}

# Prints the last value of a flag, or a default.
flag_value() { # DEFAULT SHORT LONG FLAGS...
    local value=$1 short=$2 long=$3
    shift 3
    while (($# > 0)); do
        case $1 in
            "$short" | "$long") value=${2:-} ;;
            "$long"=*) value=${1#*=} ;;
            "$short"?*) # -b8; but --pp_style is not --pp
                if [[ $short != --* ]]; then
                    value=${1#"$short"}
                    value=${value#=}
                fi
                ;;
        esac
        shift
    done
    echo "$value"
}

# Prints the --accumulation_steps that come closest to BATCH_TOKENS (default: 4M) per optimizer step.
accumulation_steps() { # BATCH_SIZE MAX_LENGTH MODEL_PARALLEL_RANKS
    local number
    for number in "$@"; do
        if [[ ! $number =~ ^[1-9][0-9]*$ ]]; then
            echo 1 # the program reports the wrong value
            return
        fi
    done
    local tokens=${BATCH_TOKENS:-4194304} once steps
    check_number BATCH_TOKENS "$tokens" 1
    once=$(($1 * $2 * (processes > $3 ? processes / $3 : 1)))
    steps=$(((tokens + once / 2) / once))
    ((steps > 0)) || steps=1
    if ((steps * once != tokens)); then
        echo "$(basename "$0" .sh): $((steps * once)) tokens per step, as close to $tokens as GPUs and flags allow" >&2
    fi
    echo "$steps"
}

# Sets batch_flags to the batch size (default: 4), the length (default: 4096) and the accumulation steps.
set_batch() { # MODEL_PARALLEL_RANKS FLAGS...
    local ranks=$1 batch_size max_length steps
    shift
    batch_size=$(flag_value 4 -b --batch_size "$@")
    max_length=$(flag_value 4096 -l --max_length "$@")
    steps=$(accumulation_steps "$batch_size" "$max_length" "$ranks")
    batch_flags=(-b "$batch_size" -l "$max_length" --accumulation_steps "$steps")
}

prepare() { # "$@" of the calling script
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        usage "$0"
        echo
        sed -n '/^# Environment:/,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit
    fi
    check_number SPARE_HOSTS "${SPARE_HOSTS:-0}" 0
    check_number MAX_RESTARTS "${MAX_RESTARTS:-0}" 0
    find_python
    read_hostfile
    count_processes
    processes=$(((hosts - ${SPARE_HOSTS:-0}) * nproc_per_node))
    # torchrun sets one thread per process, but Adam on the host speeds up with its threads.
    local cores
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc_per_node ? cores / nproc_per_node : 1))}
}

launch() { # PROGRAM FLAGS...
    local program=$root/$1
    shift
    local options=(--nproc_per_node "$nproc_per_node")
    [[ -z ${MAX_RESTARTS:-} ]] || options+=(--max_restarts "$MAX_RESTARTS")
    [[ -z ${SPARE_HOSTS:-} ]] || options+=(--spare_hosts "$SPARE_HOSTS")
    if [[ -n ${HOSTFILE:-} ]]; then
        options+=(--hostfile "$HOSTFILE" --master_addr "${MASTER_ADDR:-$first_host}")
    elif ((${#options[@]} == 2 && processes == 1)); then
        exec "$python" "$program" "$@"
    elif ((${#options[@]} == 2)); then
        exec "$python" -m torch.distributed.run --standalone "${options[@]}" "$program" "$@"
    fi
    options+=(--master_port "${MASTER_PORT:-29500}")
    [[ -z ${SSH_PORT:-} ]] || options+=(--ssh-port "$SSH_PORT")
    # `colossalai run`, with connections that report which host failed and how.
    exec "$python" "$root/scripts/run_on_hosts.py" "${options[@]}" "$program" "$@"
}
