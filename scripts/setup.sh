#!/usr/bin/env bash
# Makes the virtual environment that `make demo` and `make test` use. Safe to run again.
#
#   PYTHON  interpreter to build on, 3.11 or newer; by default the first one found
#   VENV    folder of the environment
#   TORCH   what pip is asked for when torch is not there yet, options included, for example
#           TORCH="torch==2.13.0 --index-url URL"; pip's own settings (PIP_INDEX_URL, ...) apply
#
# torch is settled before anything else, since pip's plain torch on Linux is the CUDA build, several
# GB that a machine without a GPU cannot use:
#   1. the interpreter has torch already: that one, through --system-site-packages;
#   2. TORCH is given: that;
#   3. no NVIDIA GPU: the CPU build of the pinned version where pip finds one, else plain torch;
#   4. a GPU: whatever torch pip resolves.
set -euo pipefail

PYTHON=${PYTHON:-}
VENV=${VENV:-.venv}
TORCH=${TORCH:-}
PINNED=2.13.0

say() { printf 'setup: %s\n' "$*" >&2; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if new_enough "$candidate"; then
        PYTHON=$candidate
        break
    fi
done
new_enough "$PYTHON" || {
    say "no Python 3.11 or newer${PYTHON:+ at $PYTHON}; name one: make PYTHON=/path/to/python3 ..."
    exit 2
}

has_torch() {
    "$1" - <<'PY' 2>/dev/null
import sys
from importlib.metadata import version
import torch
sys.exit(tuple(map(int, version("torch").split(".")[:2])) < (2, 9))
PY
}

say "environment in $VENV"
if has_torch "$PYTHON"; then
    "$PYTHON" -m venv --system-site-packages "$VENV"
    # An interpreter that is itself of a virtual environment hands nothing down: point to its packages.
    has_torch "$VENV/bin/python" || "$PYTHON" -c \
        'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
        >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
else
    "$PYTHON" -m venv "$VENV"
fi
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

if has_torch "$VENV/bin/python"; then
    say "torch is there already"
elif [ -n "$TORCH" ]; then
    say "installing $TORCH"
    # shellcheck disable=SC2086 # TORCH may carry pip options
    pip install --quiet $TORCH
elif ! nvidia-smi >/dev/null 2>&1; then
    say "no NVIDIA GPU: looking for a CPU build of torch $PINNED"
    pip install --quiet "torch==$PINNED+cpu" 2>/dev/null || {
        say "none found; installing plain torch $PINNED (set TORCH to choose another)"
        pip install --quiet "torch==$PINNED"
    }
fi

say "installing starkv and what it needs (a few minutes the first time)"
pip install --quiet --editable '.[dev]'
