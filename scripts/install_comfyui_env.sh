#!/usr/bin/env bash
# Makes <comfyui>/.venv: a CPU-only Python environment in which ComfyUI starts with this pack, for `pytest -m host`.
# It can be run again.
#   scripts/install_comfyui_env.sh [PATH_OF_COMFYUI]      default: $COMFYUI_PATH, else ~/comfy/ComfyUI
# Environment: PYTHON (default python3.11), TORCH_VERSION (default 2.13.0), PIP_ARGS (extra pip arguments,
# e.g. "--extra-index-url https://download.pytorch.org/whl/cpu" where the default index only has CUDA builds).
set -euo pipefail

pack="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
comfyui="${1:-${COMFYUI_PATH:-$HOME/comfy/ComfyUI}}"
test -f "$comfyui/main.py" || { echo "no ComfyUI at $comfyui" >&2; exit 2; }
comfyui="$(cd "$comfyui" && pwd)"
python="${PYTHON:-$(command -v python3.11 || command -v python3)}"
torch="torch==${TORCH_VERSION:-2.13.0}"
venv="$comfyui/.venv"
py="$venv/bin/python"
read -r -a pip_args <<<"${PIP_ARGS:-}"

if [ -x "$py" ] && [ ! -f "$venv/made_by_context_forcing" ]; then
    echo "$venv was not made by this script and is not changed; tests/host needs pytest and ftfy in it"
    exit 0
fi
"$python" -m venv "$venv"
touch "$venv/made_by_context_forcing"
pip() { "$py" -m pip install --disable-pip-version-check -q ${pip_args[@]+"${pip_args[@]}"} "$@"; }

# torch first, and pinned on every line: spandrel and others would otherwise pull a CUDA torch.
pip "$torch"
# ComfyUI's requirements less the four that only come as CUDA builds or drag one in.
requirements="$(mktemp)"
trap 'rm -f "$requirements"' EXIT
grep -vE '^(torch|torchvision|torchaudio|torchsde)([^A-Za-z0-9_-].*)?$' "$comfyui/requirements.txt" >"$requirements"
pip "$torch" -r "$requirements"
# ComfyUI imports these at boot; here without their dependencies (trampoline is torchsde's).
pip --no-deps torchsde trampoline torchaudio
# The packages that ComfyUI's Manager installs for this pack, then those of tests/host.
pip "$torch" -r "$pack/requirements.txt"
pip pytest ftfy

# CUDA builds of torchvision and torchaudio cannot load their libraries beside a CPU torch.
"$py" - <<'PY'
import importlib.util
import pathlib
import subprocess
import sys

import torch


def folder(name):
    """Where a package lies, without importing it."""
    return pathlib.Path(importlib.util.find_spec(name).submodule_search_locations[0])


if torch.version.cuda is None:
    if subprocess.run([sys.executable, "-c", "import torchaudio"], capture_output=True).returncode:
        for library in (folder("torchaudio") / "lib").glob("*.so"):
            library.unlink()  # torchaudio then imports as "no extension"
    extension = folder("torchvision") / "extension.py"
    text, mark = extension.read_text(), "# --- CPU stub: op schemas the missing library would register ---"
    if mark not in text:
        extension.write_text(text.rstrip("\n") + f'''


{mark}
if not _has_ops():
    _stub_library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _stub_library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
''')
PY

# Check that the hard imports work and that torch has the requested version.
"$py" - <<'PY'
import av, ftfy, imageio_ffmpeg, kornia, pytest, spandrel, sqlalchemy, torch, torchaudio, torchsde, torchvision, yaml

print("torch", torch.__version__, "torchvision", torchvision.__version__, "torchaudio", torchaudio.__version__)
PY
