#!/bin/bash
# Start-up script of a Lightning Studio: installs the project into the Studio's environment, whose torch stays as it is.
# Once, in the Studio's terminal:
#   git clone <this repository> ~/remax-lightning
#   cp ~/remax-lightning/studio/on_start.sh ~/.lightning_studio/on_start.sh
# The Studio runs it from the home folder at each start. It installs only if what has to be installed has changed.
# REMAX_LIGHTNING_DIR is the project's folder if it is another.
set -euo pipefail

project="${REMAX_LIGHTNING_DIR:-$HOME/remax-lightning}"
if [ ! -f "$project/setup.cfg" ]; then
    echo "remax-lightning: there is no project in $project; clone it there, or set REMAX_LIGHTNING_DIR" >&2
    exit 1
fi

# what the installation depends on: the requirements, the folder, the Python and its torch
torch=$(python -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
state=$(
    cat "$project/setup.cfg" "$project/pyproject.toml"
    echo "$project $(command -v python) ${torch:-none}"
)
stamp="$HOME/.cache/remax-lightning-installed"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] \
    && python -c 'import importlib.metadata as m; m.version("remax-lightning")' 2>/dev/null; then
    echo "remax-lightning: installed already"
    exit 0
fi

constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
if [ -n "$torch" ]; then
    echo "torch==$torch" >"$constraints" # a torch that is too old is an error, not another torch
fi
python -m pip install --quiet --constraint "$constraints" --editable "$project"
mkdir -p "$(dirname "$stamp")"
echo "$state" >"$stamp"
echo "remax-lightning: installed, with torch ${torch:-from the package index}"
