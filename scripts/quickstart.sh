#!/usr/bin/env bash
# Aligns the built-in model with preferences, measures it against truth and prints where the report is.
set -euo pipefail
. "$(dirname "$0")/setup.sh" ""
exec .venv/bin/diffalign train configs/shapes-dpo.yaml output_dir=runs/quickstart resume_from=auto "$@"
