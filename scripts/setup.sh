#!/bin/sh
# Make .venv with Python 3.12 and install the project, its tests and the simulated arm into it.
# Works on Linux and macOS. Without libraries for rendering it installs everything else and says what is missing.
set -eu
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
has() { command -v "$1" >/dev/null 2>&1; }
is_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }

find_python() {
    for candidate in "${PYTHON312:-}" python3.12 python3 /opt/homebrew/bin/python3.12 /usr/local/bin/python3.12 \
        "${HOME:-/nowhere}"/.pyenv/versions/3.12*/bin/python3 "${PYENV_ROOT:-/nowhere}"/versions/3.12*/bin/python3 \
        "$(has uv && uv python find 3.12 2>/dev/null || true)"; do
        if [ -n "$candidate" ] && is_312 "$candidate"; then echo "$candidate"; return; fi
    done
    return 1
}

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

# Names of the EGL libraries that the system has. Not every system has ldconfig, or has it in PATH.
egl_libraries() {
    for ldconfig in ldconfig /sbin/ldconfig /usr/sbin/ldconfig; do
        if has "$ldconfig"; then "$ldconfig" -p 2>/dev/null | grep -o 'libEGL[^ ]*' || true; return; fi
    done
    for file in /lib*/libEGL* /usr/lib*/libEGL* /usr/lib*/*/libEGL* /usr/local/lib*/libEGL* /run/opengl-driver/lib/libEGL*; do
        if [ -e "$file" ]; then echo "${file##*/}"; fi
    done
}

# EGL itself and an implementation of it.
has_egl() {
    found=$(egl_libraries)
    case $found in *libEGL.so.1*) ;; *) return 1 ;; esac
    case $found in *libEGL_mesa* | *libEGL_nvidia*) ;; *) return 1 ;; esac
}

DEBIAN="libegl1 libegl-mesa0 libgl1-mesa-dri"

# MuJoCo renders through EGL, a library of the system; macOS brings its own way to render.
if [ "$(uname -s)" != Darwin ] && ! has_egl; then
    installed=no
    if has apt-get; then
        say "installing Debian packages for rendering without a screen: $DEBIAN"
        # shellcheck disable=SC2086  # three packages
        if as_root apt-get update -qq && as_root apt-get install -y -qq $DEBIAN; then installed=yes; fi
    fi
    if [ $installed = no ]; then
        say "EGL is missing, so the simulated arm cannot render: \`make demo\` will stop, \`make test\` will skip its tests.
   Everything else is installed now. To add EGL, ask an administrator for one of
      apt-get install $DEBIAN       (Debian, Ubuntu)
      dnf install mesa-libEGL mesa-dri-drivers                   (Fedora, RHEL)
      pacman -S mesa libglvnd                                    (Arch)
      zypper install Mesa-libEGL1 Mesa-dri                       (openSUSE)
      apk add mesa-egl mesa-dri-gallium                          (Alpine)"
    fi
fi

if [ ! -x .venv/bin/python ]; then
    if ! python=$(find_python); then
        say "Python 3.12 was not found, and LeRobot needs it. Install it with one of
   uv python install 3.12        pyenv install 3.12        brew install python@3.12
   apt-get install python3.12 python3.12-venv              dnf install python3.12
   or name it: PYTHON312=/path/to/python3.12 make setup"
        exit 1
    fi
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv || {
        say "$python cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3.12-venv"
        exit 1
    }
fi

say "installing the project and what it needs (some gigabytes the first time: PyTorch)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -e examples/virtual_so100
say "ready: .venv/bin has lerobot-train, lerobot-rollout and the rest of LeRobot's commands"
