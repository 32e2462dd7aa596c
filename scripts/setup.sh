#!/usr/bin/env bash
# Installs everything that the programs need into .venv in the repository. Later runs reuse it and end at once.
#
#   bash scripts/setup.sh         packages for training
#   bash scripts/setup.sh --dev   also those for scripts/test.sh
#
# Environment:
#   PYTHON=/path/python3.12     the interpreter that creates .venv (3.11 or later; default: python3)
#   INSTALLER=uv                uv or pip (default: uv if it is installed and pip has no indexes, find-links or
#                               constraints in its configuration, which uv would not read; else pip)
#   LLAMA_PYTHON=/path/python   use this interpreter with its own torch and ColossalAI, and install nothing: for
#                               machines that come with them, or have no network

# Other scripts source this file and call set_up, which changes to the repository root and sets $python.
set -euo pipefail

readonly MINIMUM_PYTHON=3.11
readonly INSTALL_LOG=.venv/install.log
readonly INSTALLING=.venv/installing # exists until a new .venv is complete, so that an interrupted one is created again

say() { echo "setup: $*"; }
fail() {
    echo "$(basename "$0" .sh): error: $*" >&2
    exit 1
}

# Prints the comment that opens a script.
usage() { sed -n '2,/^[^#]*$/{/^#/s/^# \{0,1\}//p}' "$1"; }

python_version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }

# Runs a command with its output in the log, and shows the end of the log if the command fails.
logged() {
    if ! "$@" >>"$INSTALL_LOG" 2>&1; then
        tail -n 20 "$INSTALL_LOG" >&2
        fail "this failed: $* (full output: $INSTALL_LOG)"
    fi
}

check_installer() {
    case ${INSTALLER:-pip} in
        pip) ;;
        uv) command -v uv >/dev/null || fail "INSTALLER=uv: uv is not installed; install it, or leave INSTALLER out" ;;
        *) fail "INSTALLER='$INSTALLER' is neither uv nor pip; give one of them, or leave INSTALLER out" ;;
    esac
}

# Prints uv or pip.
choose_installer() {
    local own='\.(no-|extra-)?(index|find-links|constraint)' # of pip's configuration
    if [[ -n ${INSTALLER:-} ]]; then
        echo "$INSTALLER"
    elif ! command -v uv >/dev/null || [[ $(.venv/bin/python -m pip config list) =~ $own ]]; then
        echo pip
    else
        echo uv
    fi
}

make_environment() {
    local base=${PYTHON:-python3} version have
    version=$(python_version "$base") ||
        fail "'$base' does not run; install Python $MINIMUM_PYTHON or later, or set PYTHON to its path"
    have=$(python_version .venv/bin/python || true)
    # Without PYTHON, a working environment is kept even if python3 has changed since.
    if [[ ! -e $INSTALLING && -n $have && (-z ${PYTHON:-} || $have == "$version") ]]; then
        return
    fi
    [[ $(printf '%s\n' "$MINIMUM_PYTHON" "$version" | sort -V | head -n 1) == "$MINIMUM_PYTHON" ]] ||
        fail "'$base' is Python $version, but $MINIMUM_PYTHON or later is needed; set PYTHON to the path of one"
    say "making .venv with Python $version"
    rm -rf .venv
    mkdir .venv
    touch "$INSTALLING"
    logged "$base" -m venv .venv
}

# Installs, unless these very files were installed with this Python before. Success writes a stamp.
install_once() { # STAMP MESSAGE REQUIREMENTS_FILE...
    local stamp=.venv/$1.stamp message=$2 state
    shift 2
    state=$(python_version .venv/bin/python && cat -- "$@")
    [[ -f $stamp && $(<"$stamp") == "$state" ]] && return
    local file installer install
    installer=$(choose_installer)
    install=(.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off)
    [[ $installer != uv ]] || install=(uv pip install --python .venv/bin/python)
    say "$message with $installer (first time only; progress: $INSTALL_LOG)"
    for file in "$@"; do
        local options=(--requirement "$file")
        [[ $file != requirements-colossalai.txt ]] || options+=(--no-deps)
        logged "${install[@]}" "${options[@]}"
    done
    printf '%s' "$state" >"$stamp"
    rm -f "$INSTALLING"
}

check_given_python() {
    python_version "$LLAMA_PYTHON" >/dev/null || fail "LLAMA_PYTHON='$LLAMA_PYTHON' is not a Python that runs"
    "$LLAMA_PYTHON" - "$@" <<'PY' || fail "LLAMA_PYTHON='$LLAMA_PYTHON' lacks the packages named above; install them there"
import importlib.util
import sys
needed = ["torch", "transformers", "datasets", "sentencepiece", "tensorboard", "xxhash", "colossalai"]
if "--dev" in sys.argv:
    needed += ["pytest", "pytest_timeout", "hypothesis", "ruff", "codespell_lib", "mypy", "matplotlib", "lm_eval"]
missing = [name for name in needed if importlib.util.find_spec(name) is None]
sys.exit(f"missing: {', '.join(missing)}" if missing else 0)
PY
}

set_up() { # [--dev]
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    if [[ -n ${LLAMA_PYTHON:-} ]]; then
        check_given_python "$@"
        python=$LLAMA_PYTHON
        return
    fi
    check_installer
    ( # The lock on the repository folder lasts until this subshell ends.
        flock --nonblock 9 || {
            say "waiting for another setup of this folder to end"
            flock 9
        }
        make_environment
        install_once run "installing requirements.txt and ColossalAI, 1 to 5 minutes," \
            requirements.txt requirements-colossalai.txt
        [[ ${1:-} != --dev ]] || install_once dev "installing requirements-dev.txt, 1 minute," requirements-dev.txt
    ) 9<.
    python=.venv/bin/python
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    case ${1:-} in
        -h | --help) usage "$0" ;;
        "" | --dev)
            set_up "$@"
            say "ready: $python"
            ;;
        *) fail "unknown option '$1'; see bash scripts/setup.sh --help" ;;
    esac
fi
