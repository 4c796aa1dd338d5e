#!/usr/bin/env bash
# Sourced by the scripts beside it: makes .venv in the repository, installs stgen[$1] there once, and activates it.
# PYTHON names another interpreter than python3 (3.10 or newer); STGEN_VENV another place for the environment.
extra=$1
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repository"
venv=${STGEN_VENV:-$repository/.venv}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $python is older than Python 3.10" >&2; exit 2; }
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then  # none yet, or an interrupted one
    echo "== creating $venv"
    "$python" -m venv "$venv"
fi
# Installed again only when what is asked for has changed; the dev extra holds all others.
stamp=$(cat pyproject.toml launch/constraints-cpu.txt | cksum)
if ! grep -qsxF "$stamp" "$venv/stgen-$extra" "$venv/stgen-dev"; then
    echo "== installing stgen[$extra] into $venv (a few minutes the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint launch/constraints-cpu.txt \
        torch==2.13.0 setuptools
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint launch/constraints-cpu.txt \
        --editable ".[$extra]"
    echo "$stamp" > "$venv/stgen-$extra"
fi
export PATH="$venv/bin:$PATH"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false  # nothing is downloaded
