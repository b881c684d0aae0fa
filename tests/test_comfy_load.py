"""ComfyUI loads the pack by path, from a folder of any name; without ComfyUI it is a library."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .nodes.host import NODE_IDS

ROOT = Path(__file__).parents[1]
SHIPPED = (
    "__init__.py", "cli", "memory", "model", "nodes", "train", "video", "workers", "workflows", "subgraphs", "web",
    "locales", "pyproject.toml", "requirements.txt", "README.md", "LICENSE",
)  # fmt: skip

STUB_FOLDER = ROOT / "tests" / "nodes"
LOADER = """
import asyncio, importlib.util, json, os, sys
sys.path.append(sys.argv[2])
import comfyui_stub
finder = comfyui_stub.install()

folder = sys.argv[1]
# As ComfyUI's nodes.py does it: the module's name is the folder's path.
name = folder.replace(".", "_x_")
before = set(sys.modules)
spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "__init__.py"))
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
heavy = ("torch", "numpy", "safetensors")
new = {m for m in set(sys.modules) - before - {name} if m.split(".")[0] in heavy or m.startswith(name)}
result = {"at_import": sorted(new) + finder.imported, "mappings": hasattr(module, "NODE_CLASS_MAPPINGS")}
result["web"] = os.path.isdir(os.path.join(folder, module.WEB_DIRECTORY))

comfyui_stub.define_types()
from comfy_api.latest import ComfyExtension, io
extension = asyncio.run(module.comfy_entrypoint())
nodes = asyncio.run(extension.get_node_list())
result["ids"] = [node.define_schema().node_id for node in nodes]
result["is_extension"] = isinstance(extension, ComfyExtension) and all(issubclass(n, io.ComfyNode) for n in nodes)
result["installed_copy_used"] = "context_forcing" in sys.modules
result["from"] = sorted({m.__file__ for k, m in sys.modules.items() if k.startswith(name + ".")})
print(json.dumps(result))
"""


def load_pack(folder, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LOADER, str(folder), str(STUB_FOLDER)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def pack(tmp_path):
    """The pack as a user has it, in a folder whose name is no identifier."""
    folder = tmp_path / "custom_nodes" / "My-Pack v1.0"
    folder.mkdir(parents=True)
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder)
    return folder


def test_comfyui_loads_it_from_any_folder(pack, tmp_path):
    done = load_pack(pack, tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["at_import"] == [], "importing the root imports nothing"
    assert not result["mappings"], "NODE_CLASS_MAPPINGS would make ComfyUI skip the V3 entry point"
    assert result["web"] and result["is_extension"]
    assert result["ids"] == list(NODE_IDS)
    assert not result["installed_copy_used"]
    assert result["from"] and all(str(pack) in file for file in result["from"])


def test_a_failing_entry_point_is_logged_with_its_traceback_and_raised(pack, tmp_path):
    (pack / "nodes" / "__init__.py").write_text("raise RuntimeError('no such ComfyUI')\n")
    done = load_pack(pack, tmp_path)
    assert done.returncode == 1
    assert "Context Forcing nodes could not be loaded" in done.stderr
    assert done.stderr.count("no such ComfyUI") >= 2


def test_the_library_works_without_comfyui_and_without_extras(tmp_path):
    script = (
        "import sys, context_forcing.memory, context_forcing.model.sampler\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('comfy', 'comfy_api', 'typer', 'yaml')]\n"
        "import context_forcing.train.stages.pretrain\n"
        "assert not [m for m in sys.modules if m.startswith(('comfy', 'context_forcing.nodes'))]"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
