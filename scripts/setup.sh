#!/usr/bin/env bash
# Sets up .venv: torch, every Python dependency, mmkernels itself (editable) with its C++ extension.
# Usage: [PYTHON=python3.12] scripts/setup.sh; `make setup` calls it when something has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
torch=torch==2.13.0 # what the make targets use; pyproject.toml says what users may have
venv=.venv/bin/python

heading() { printf '== %s\n' "$*"; }
venv_pip() { "$venv" -m pip --disable-pip-version-check "$@"; }

# Whether Python $1 has a torch that pyproject.toml allows; with $2 = cuda, one that reaches a GPU.
has_torch() {
    local range
    range=$(sed -n 's/^dependencies = \["torch>=\([0-9.]*\),<\([0-9.]*\)".*/\1 \2/p' pyproject.toml)
    # shellcheck disable=SC2086  # the range is two words
    "$1" - "${2:-any}" $range 2>/dev/null <<'END'
import sys
import torch

low, version, high = (tuple(map(int, v.split(".")[:2])) for v in (sys.argv[2], torch.__version__, sys.argv[3]))
sys.exit(not (low <= version < high and (sys.argv[1] == "any" or torch.cuda.is_available())))
END
}

make_venv() {
    if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))'; then
        echo "error: mmkernels needs Python 3.10 to 3.14, and '$python' is not: name one, as in make PYTHON=python3.12" >&2
        exit 1
    fi
    if ! has_torch "$python" cuda; then
        heading "virtual environment in .venv ($("$python" --version))"
        "$python" -m venv --clear .venv
        return
    fi
    heading "virtual environment in .venv ($("$python" --version)), with the CUDA torch that is installed already"
    "$python" -m venv --clear --system-site-packages .venv
    if ! has_torch "$venv" cuda; then # $python is itself a virtual environment: the option does not reach its packages
        local site='import sysconfig; print(sysconfig.get_path("purelib"))'
        printf 'import site; site.addsitedir("%s")\n' "$("$python" -c "$site")" >"$("$venv" -c "$site")/parent.pth"
    fi
    # Python 3.11 and older put an old setuptools into the environment, before the newer one beside that torch.
    venv_pip uninstall -qq -y setuptools
}

install_torch() {
    if nvidia-smi -L >/dev/null 2>&1; then
        heading "$torch for the NVIDIA GPU: several GB the first time"
        venv_pip install -qq "$torch"
        return
    fi
    # Without a GPU plain torch would bring gigabytes of CUDA packages. Only PyTorch's index has the CPU build: pip
    # may be configured with it, and uv is.
    heading "$torch, CPU build: about 200 MB the first time"
    if venv_pip install -qq "$torch+cpu" 2>/dev/null; then
        return
    fi
    if venv_pip install -qq uv && "$venv" -m uv pip install -q --python "$venv" --torch-backend=cpu "$torch"; then
        return
    fi
    echo "warning: the CPU build of $torch is out of reach; taking the default build, with its CUDA packages" >&2
    venv_pip install -qq "$torch"
}

install_project() {
    # Not isolated, so that the extensions build against the torch that runs them: pip leaves build requirements to us.
    local build_requires
    build_requires=$(sed -n 's/^requires = \[\(.*\)\]$/\1/p' pyproject.toml | tr -d '",')
    # shellcheck disable=SC2086  # one word each
    venv_pip install -qq $build_requires
    heading "Python dependencies, the C++ extension, mmkernels (editable)"
    if venv_pip install -qq --no-build-isolation -e '.[dev,gpu]'; then
        return
    fi
    if ! grep -q 'include-system-site-packages = true' .venv/pyvenv.cfg; then
        exit 1
    fi
    echo "warning: not every dependency could be installed (no network?): going on with those that are here" >&2
    venv_pip install -qq --no-build-isolation --no-deps -e .
}

"$venv" -m pip --version >/dev/null 2>&1 || make_venv
has_torch "$venv" || install_torch
install_project
