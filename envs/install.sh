#!/bin/sh
# Installs a lock into .venv: `envs/install.sh cpu` or `envs/install.sh gpu`.
# The CPU build of torch comes from the folder that pip's configuration names as find-links where it lies there,
# else from PyTorch's own CPU index.
set -eu
cd "$(dirname "$0")/.."
lock=envs/$1.lock.txt
set --
if grep -q '^torch==.*+cpu' "$lock"; then
    folder=$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)
    if ls "$folder"/torch-*+cpu*.whl >/dev/null 2>&1; then
        set -- --find-links "$folder"
    else
        set -- --torch-backend cpu
    fi
fi
# uv compares each file with its hashes in the lock; of torch's CPU build there are none, for it comes from elsewhere.
# A lock is complete: resolving it again would pull what it leaves out on purpose.
# Compiled here, or the first job to import a package would do it.
.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --no-deps "$@" -r "$lock"
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
