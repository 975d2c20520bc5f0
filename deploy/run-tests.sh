#!/usr/bin/env bash
# All tests: those without an engine side by side, one process per core, then those that start engines, one by one,
# because an engine takes what cores there are. Further arguments are pytest's.
#
#   deploy/run-tests.sh PYTHON [ARGUMENT ...]
set -euo pipefail
python=$1
shift

nothing_selected=5
first=0
second=0
# torch's threads would only wait for each other where there is a process per core.
OMP_NUM_THREADS=1 "$python" -m pytest tests/unit tests/contract -n auto --maxprocesses 8 --dist loadfile "$@" || first=$?
"$python" -m pytest tests/integration "$@" || second=$?

# `-k` may select tests of one part alone.
if ((first == nothing_selected)); then exit "$second"; fi
if ((second == nothing_selected)); then exit "$first"; fi
exit $((first ? first : second))
