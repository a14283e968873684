#!/bin/sh
# Make .venv with Python 3.12 and install the project, its tests and the simulated arm into it.
set -eu
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
is_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }

find_python() {
    for candidate in "${PYTHON312:-}" python3.12 python3 \
        "$HOME"/.pyenv/versions/3.12*/bin/python3 "${PYENV_ROOT:-/nowhere}"/versions/3.12*/bin/python3 \
        "$(command -v uv >/dev/null 2>&1 && uv python find 3.12 2>/dev/null || true)"; do
        if [ -n "$candidate" ] && is_312 "$candidate"; then echo "$candidate"; return; fi
    done
    return 1
}

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

# MuJoCo renders through EGL or OSMesa, and both are system libraries.
if ! ldconfig -p 2>/dev/null | grep -q 'libEGL\.so\.1' || ! ldconfig -p | grep -q libEGL_mesa; then
    say "installing Debian packages for rendering without a screen: libegl1 libegl-mesa0 libgl1-mesa-dri"
    if ! { command -v apt-get >/dev/null && as_root apt-get update -qq \
        && as_root apt-get install -y -qq libegl1 libegl-mesa0 libgl1-mesa-dri; }; then
        say "could not install them. The simulated arm needs EGL: ask an administrator for
   libegl1 libegl-mesa0 libgl1-mesa-dri (Debian, Ubuntu) or your system's Mesa, then run make again."
        exit 1
    fi
fi

if [ ! -x .venv/bin/python ]; then
    if ! python=$(find_python); then
        say "Python 3.12 was not found, and LeRobot needs it. Install it with one of
   uv python install 3.12        pyenv install 3.12        apt-get install python3.12 python3.12-venv
   or name it: PYTHON312=/path/to/python3.12 make setup"
        exit 1
    fi
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv || { say "the module venv is missing: apt-get install python3.12-venv"; exit 1; }
fi

say "installing the project and what it needs (some gigabytes the first time: PyTorch)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -e examples/virtual_so100
say "ready: .venv/bin has lerobot-train, lerobot-rollout and the rest of LeRobot's commands"
