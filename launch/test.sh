#!/usr/bin/env bash
# Sets everything up, then lint, format, types and all tests. Arguments go to pytest: ./launch/test.sh -m "not slow"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== pytest"
python -m pytest "$@"
