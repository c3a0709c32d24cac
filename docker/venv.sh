#!/usr/bin/env bash
# Makes the virtual environment that everything runs in, on a host (`make venv`) and in the images.
#   docker/venv.sh make VENV [auto|cpu|cuda]   all of it; does nothing when VENV is complete and its pins are unchanged
#   docker/venv.sh create|torch|requirements|project|check VENV cpu|cuda    one step each, for the images
# In: PYTHON (default: the first of python3, python3.12, python3.11 that is 3.11 or 3.12), docker/requirements/*.txt.
# Out: VENV with VENV/.complete, written last, so that a half-made environment is seen and made again.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
reqs=$root/docker/requirements
say() { echo "venv: $*" >&2; }
die() { say "$*"; exit 1; }

# The interpreter itself, not a virtual environment's link to it: the active environment may be the one that is about to be removed.
find_python() {
  local p found
  for p in ${PYTHON:-python3 python3.12 python3.11}; do
    if found=$("$p" -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 12) or sys.exit(1); print(sys._base_executable)' 2>/dev/null); then
      echo "$found"; return
    fi
  done
  die "needs Python 3.11 or 3.12 (tried: ${PYTHON:-python3 python3.12 python3.11}). Debian and Ubuntu: apt-get install python3 python3-venv; or: make PYTHON=/path/to/python"
}

find_device() {
  case ${1:-auto} in
    cpu|cuda) echo "$1" ;;
    auto) if nvidia-smi -L >/dev/null 2>&1; then echo cuda; else echo cpu; fi ;;
    *) die "DEVICE is auto, cpu or cuda, not '$1'" ;;
  esac
}

check_compiler() { # PYTHON
  command -v g++ >/dev/null || say "warning: no g++: DeepSpeed's CPU op and torch.compile will not build. Debian and Ubuntu: apt-get install g++ python3-dev"
  "$1" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
    say "warning: no Python.h: DeepSpeed's CPU op and torch.compile will not build. Debian and Ubuntu: apt-get install python3-dev"
  # ninja, the other thing they need, comes with the requirements (VENV/bin/ninja)
}

sum() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }

# What the environment depends on; a checkout that was moved counts as changed, because scripts in a venv hold its path.
wanted() { # VENV DEVICE PYTHON
  { echo "$1 $2 $("$3" -c 'import platform; print(platform.python_version(), platform.machine())')"
    cat "$reqs/cpu.txt" "$reqs/cuda.txt" "$reqs/installer.txt"; } | sum | cut -d' ' -f1
}

quiet_pip() { # VENV args...
  local v=$1; shift
  "$v/bin/python" -m pip --disable-pip-version-check install --quiet --no-input "$@"
}

# Installs a hashed file. uv takes seconds where pip takes minutes, but knows nothing of pip's settings: where it fails, pip does it.
install_file() { # VENV FILE
  local v=$1 file=$2
  if quiet_pip "$v" --no-deps --require-hashes -r "$reqs/installer.txt" 2>/dev/null &&
     "$v/bin/uv" pip install --quiet --system-certs --python "$v/bin/python" --compile-bytecode --no-deps --require-hashes -r "$file"; then return; fi
  say "uv could not install $(basename "$file"); pip does it now (slower)"
  quiet_pip "$v" --no-deps --require-hashes -r "$file"
}

create() { # VENV
  local py; py=$(find_python)
  "$py" -c 'import venv, ensurepip' 2>/dev/null || die "Python's venv module is missing. Debian and Ubuntu: apt-get install python3-venv"
  rm -rf "$1"; "$py" -m venv "$1"
}

torch() { # VENV DEVICE
  [ "$2" = cpu ] || return 0           # cuda.txt holds torch itself
  local pin; pin=$(sed -nE 's/^(torch==[^ ;]+).*/\1/p' "$reqs/cuda.txt")
  say "installing $pin"
  quiet_pip "$1" --no-deps "$pin" || die "$pin could not be installed: see pip's message above"
}

requirements() { # VENV DEVICE
  local file=$reqs/cuda.txt
  if [ "$2" = cpu ]; then
    # Linux wheels of torch on the public index are CUDA builds: they import only beside their NVIDIA packages.
    if "$1/bin/python" - <<'PY'
import sys
from importlib.metadata import requires, version
sys.exit("+cpu" not in version("torch") and any(r.startswith(("nvidia-", "cuda-")) for r in requires("torch") or ()) and sys.platform == "linux")
PY
    then file=$reqs/cpu.txt
    else say "pip found a CUDA build of torch, so its NVIDIA packages (several GB) come too; to avoid that, point PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS at a CPU build"
    fi
  fi
  say "installing $(grep -c '^[a-z].*==' "$file") packages from docker/requirements/$(basename "$file")"
  install_file "$1" "$file"
}

install() { # VENV FILE-IN-docker/requirements
  install_file "$1" "$reqs/$2"
}

project() { # VENV
  quiet_pip "$1" --no-deps --no-build-isolation -e "$root"
}

# RecBole's metadata asks for ray and two old colour packages (see pyproject.toml); any other mismatch is a mistake in the pins.
check() { # VENV
  local bad; bad=$("$1/bin/python" -m pip --disable-pip-version-check check 2>/dev/null | grep -vE '^recbole .* (ray|colorama|colorlog)' | grep -v '^No broken' || true)
  [ -z "$bad" ] || die "these packages do not fit together: $bad"
}

make() { # VENV DEVICE
  local v device py want t=$SECONDS
  mkdir -p "$(dirname "$1")"; v=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
  device=$(find_device "${2:-auto}"); py=$(find_python); want=$(wanted "$v" "$device" "$py")
  if [ "$(cat "$v/.complete" 2>/dev/null)" = "$want" ]; then return; fi
  if command -v flock >/dev/null; then   # two makes at once: the second waits, then finds it done
    exec 9> "$v.lock"; flock 9
    if [ "$(cat "$v/.complete" 2>/dev/null)" = "$want" ]; then return; fi
  fi
  if [ -e "$v" ]; then
    if [ -e "$v/.complete" ]; then say "the pins, the Python or the place changed: making $v again"; else say "$v is half made: making it again"; fi
    rm -f "$v/.complete"
  fi
  say "making $v for $device with $("$py" --version) ..."
  check_compiler "$py"
  PYTHON=$py create "$v"; torch "$v" "$device"; requirements "$v" "$device"; project "$v"; check "$v"
  echo "$want" > "$v/.complete"
  say "done in $((SECONDS - t)) s"
}

case ${1:-} in
  make|create|torch|requirements|install|project|check) "$@" ;;
  *) die "usage: docker/venv.sh make VENV [auto|cpu|cuda]" ;;
esac
