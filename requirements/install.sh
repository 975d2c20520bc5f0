#!/usr/bin/env bash
# Installs pinned packages into the environment of the given Python, without resolving anything.
#
#   requirements/install.sh PYTHON cpu|cuda [further pin file ...]
#   requirements/install.sh PYTHON torch-cpu          only torch's CPU build
#
# torch's CPU build is not on the Python Package Index. It is taken from the package sources that pip is configured
# with; where those do not have it, from PyTorch's own CPU index, whose address uv knows (--torch-backend cpu).
# PyTorch's index is never an extra index for everything: an unreachable one costs minutes of retries per package.
set -euo pipefail

python=$1
variant=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)

pip_install() {
    # -qq hides pip's remarks about package sources; errors are still shown.
    "$python" -m pip install -qq --no-input --no-deps "$@"
}

say() {
    printf '==> %s\n' "$*"
}

install_torch_cpu() {
    local pin
    pin=$(grep -E '^torch==' "$here/cpu.txt")
    if "$python" -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch") != sys.argv[1])' "${pin#torch==}" 2>/dev/null; then
        return
    fi
    say "$pin"
    if ! pip_install "$pin"; then
        say "the configured package sources have no $pin; asking PyTorch's CPU index through uv"
        pip_install uv
        "$python" -m uv pip install --quiet --python "$python" --no-deps --torch-backend cpu "${pin%+cpu}" || {
            say "torch's CPU build could not be installed: put its wheel into a folder and set PIP_FIND_LINKS to it" >&2
            exit 1
        }
    fi
}

count() {
    grep -cE '^[^#]' "$1"
}

case $variant in
    torch-cpu) install_torch_cpu; exit ;;
    cpu) install_torch_cpu ;;
    cuda) ;;
    *) echo "install.sh: VARIANT is 'cpu' or 'cuda', not '$variant'" >&2; exit 2 ;;
esac

for pins in "$here/$variant.txt" "$@"; do
    say "$(basename "$pins"): $(count "$pins") pinned packages"
    pip_install -r "$pins"
done
