#!/bin/sh
# Collects wheels for a machine that has PyTorch, torchvision and CUDA but no network: this package and what it needs.
# Install them there with python3 -m pip install --no-index --no-deps --target=DIR *.whl, then set PYTHONPATH=DIR.
# usage: scripts/gpu_wheels.sh FOLDER
set -eu
folder=${1:?folder for the wheels}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"

# The versions that are installed here: the tests ran with them.
pinned=$("$python" - <<'PY'
from importlib.metadata import version

NEEDED = """lerobot draccus mergedeep mypy-extensions toml typing-inspect gymnasium farama-notifications termcolor
transformers tokenizers regex safetensors huggingface_hub httpx httpcore h11 anyio idna certifi tqdm PyYAML packaging
accelerate psutil requests urllib3 charset-normalizer opencv-python-headless xxhash einops"""
print(*(f"{name}=={version(name)}" for name in NEEDED.split()))
PY
)
platforms=""
for tag in manylinux1 manylinux2010 manylinux2014 manylinux_2_17 manylinux_2_24 manylinux_2_27 manylinux_2_28; do
    platforms="$platforms --platform ${tag}_x86_64"
done
# shellcheck disable=SC2086
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
    --dest "$folder" $pinned
"$python" -m build --wheel --outdir "$folder" . >/dev/null
ls -l "$folder"
