#!/usr/bin/env bash
# Sets everything up, then lint, format, types and all tests, two files at a time, since many start processes of their own and
# wait for them. Arguments go to pytest: ./launch/test.sh -m "not slow"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== pytest"
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
