#!/usr/bin/env bash
# Everything that must hold: style, types, floors, tests. Arguments go to pytest: scripts/test.sh -m "not slow"
set -euo pipefail
. "$(dirname "$0")/setup.sh" "[dev]"
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
mypy
lint-imports
# one test process a core, one thread each: two processes of two threads would wait for each other
OMP_NUM_THREADS=1 python -m pytest -n auto --dist worksteal "$@"
