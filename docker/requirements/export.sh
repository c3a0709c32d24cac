#!/usr/bin/env bash
# pyproject.toml -> docker/requirements/*.txt: every package pinned, every file hashed, no index named.
# Run by `make requirements`; needs uv (docker/requirements/installer.txt holds the version). uv.lock stays local: it names hosts.
set -euo pipefail
cd "$(dirname "$0")/../.."
uv=${UV:-uv}

# A fresh clone has no lock: one is made from the pins, so that only what pyproject.toml asks for moves.
if [ ! -e uv.lock ]; then
  seed=$(mktemp -d); trap 'rm -rf "$seed"' EXIT
  cp pyproject.toml "$seed"
  { printf '\nconstraint-dependencies = [\n'
    sed -nE 's/^([a-z][^ ;]*==[^ ;]*)( ;.*)? \\$/"\1\2",/p' docker/requirements/{cuda,flash-attn,mlflow}.txt | sort -u
    printf ']\n'; } > "$seed/pins"
  sed -i "/^\[tool.uv\]$/r $seed/pins" "$seed/pyproject.toml"
  (cd "$seed" && "$uv" lock --quiet) && cp "$seed/uv.lock" .
fi
"$uv" lock "$@"                        # e.g. --upgrade, --upgrade-package NAME

# make(file, what it is for, export options...)
make() {
  local file=docker/requirements/$1 what=$2; shift 2
  { echo "# $what"
    echo "# Made by \`make requirements\` from pyproject.toml: do not edit. Python 3.11 and 3.12."
    "$uv" export --frozen --quiet --no-header --no-annotate --no-emit-project --no-default-groups --format requirements.txt "$@"
  } > "$file.new"
  if grep -nE '://|^-|^\.|file:' "$file.new"; then
    echo "$file would name an index, an option or a local path: see the lines above" >&2; rm "$file.new"; exit 1
  fi
  mv "$file.new" "$file"
}

make cpu.txt       "Everything but torch and what only torch's CUDA build needs." --extra deepspeed --extra dev --prune torch
make cuda.txt      "Everything, with torch's CUDA build and its NVIDIA packages." --extra deepspeed --extra dev
make mlflow.txt    "The MLflow server's image."                                  --only-group mlflow-server
make flash-attn.txt "flash-attn, compiled in a stage of its own on the CUDA base image." --only-group flash-attn --prune torch
make installer.txt "The installer that docker/venv.sh uses for speed; pip does when it fails." --only-group installer
wc -l docker/requirements/*.txt
