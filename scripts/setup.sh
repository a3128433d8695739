# Sourced by quickstart.sh and test.sh: makes .venv and installs diffalign in it, or reuses it while it is current.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "diffalign needs Python 3.11 or newer; set PYTHON to one (found $("$python" --version))" >&2
  exit 2
}
hash="$(cat pyproject.toml constraints.txt | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
installed="$(cat .venv/diffalign-installed 2>/dev/null || true)"
if { [ "$installed" != "$1 $hash" ] && [ "$installed" != "[dev] $hash" ]; } || ! .venv/bin/python -c '' 2>/dev/null; then
  echo "Installing into .venv (once, a few minutes) ..." >&2
  .venv/bin/python -m pip --version > /dev/null 2>&1 || "$python" -m venv --clear .venv  # none, or half of one
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$1"
  echo "$1 $hash" > .venv/diffalign-installed
fi
