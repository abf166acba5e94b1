#!/usr/bin/env bash
# Runs benchmarks/gpu.py by a Python whose torch reaches a GPU, and installs nothing where there is one.
# Usage: [PYTHON=python3.12] scripts/gpu.sh [arguments of gpu.py]; `make gpu` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=.venv/bin/python

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # mmkernels need not be installed

able() {
    "$1" -c 'import pytest, pytest_benchmark, rich, torch, transformers; assert torch.cuda.is_available()' 2>/dev/null
}

for candidate in "$venv" "$python"; do
    if able "$candidate"; then
        exec "$candidate" benchmarks/gpu.py "$@"
    fi
done
if nvidia-smi -L >/dev/null 2>&1; then # a GPU, and no torch for it yet
    scripts/setup.sh
fi
if [ ! -x "$venv" ]; then
    venv=$python
fi
exec "$venv" benchmarks/gpu.py "$@"
