"""One folder, two lives: ComfyUI loads it by path under any name; pip installs one package and its files."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = (
    "__init__.py", "cli", "memory", "model", "nodes", "train", "video", "workflows", "web", "locales",
    "pyproject.toml", "requirements.txt", "README.md", "LICENSE",
)  # fmt: skip

LOADER = r'''
import asyncio, importlib.abc, importlib.machinery, importlib.util, json, os, sys, types
from unittest.mock import MagicMock

class Stub(types.ModuleType):
    """A module or package of ComfyUI's: anything asked of it is there."""
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)

class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Stub(spec.name)
    def exec_module(self, module):
        asked.append(module.__name__)

asked = []
sys.meta_path.insert(0, StubFinder())

folder = sys.argv[1]
# As ComfyUI's nodes.py does it: the module's name is the folder's path.
name = folder.replace(".", "_x_")
before = set(sys.modules)
spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "__init__.py"))
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
new = set(sys.modules) - before - {name}
says = {"at_import": sorted(m for m in new if m.split(".")[0] in ("torch", "numpy", "safetensors")), "asked": list(asked)}
says["rooms"] = sorted(m for m in new if m.startswith(name))
says["mappings"] = hasattr(module, "NODE_CLASS_MAPPINGS")
says["web"] = os.path.isdir(os.path.join(folder, module.WEB_DIRECTORY))

import comfy.sd, comfy_api.latest as api
class ComfyNode: pass
class ComfyExtension: pass
api.ComfyExtension = ComfyExtension
api.io = MagicMock(name="io")
api.io.ComfyNode = ComfyNode
api.io.Schema = lambda **fields: types.SimpleNamespace(**fields)
comfy.sd.VAE = type("VAE", (), {})

extension = asyncio.run(module.comfy_entrypoint())
nodes = asyncio.run(extension.get_node_list())
says["ids"] = [node.define_schema().node_id for node in nodes]
says["is_extension"] = isinstance(extension, ComfyExtension) and all(issubclass(n, ComfyNode) for n in nodes)
says["installed_copy_used"] = "context_forcing" in sys.modules
says["from"] = sorted({m.__file__ for k, m in sys.modules.items() if k.startswith(name + ".")})
print(json.dumps(says))
'''


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
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(pack)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    says = json.loads(done.stdout.splitlines()[-1])
    assert says["at_import"] == says["asked"] == says["rooms"] == [], "importing the root imports nothing"
    assert not says["mappings"], "NODE_CLASS_MAPPINGS would make ComfyUI skip the V3 entry point"
    assert says["web"]
    assert says["is_extension"]
    assert sorted(says["ids"]) == [
        "ContextForcingConsistency", "ContextForcingLoadDemo", "ContextForcingLoadMemory", "ContextForcingLoadStudent",
        "ContextForcingMemory", "ContextForcingMemoryReport", "ContextForcingRemember", "ContextForcingSampler",
        "ContextForcingSaveMemory", "ContextForcingSaveVideo", "ContextForcingStoryboard",
        "ContextForcingStudentSettings",
    ]  # fmt: skip
    assert not says["installed_copy_used"]
    assert says["from"] and all(str(pack) in file for file in says["from"])


def test_a_failing_entry_point_is_logged_with_its_traceback_and_raised(pack, tmp_path):
    (pack / "nodes" / "__init__.py").write_text("raise RuntimeError('no such ComfyUI')\n")
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(pack)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
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


@pytest.mark.slow
def test_the_wheel_holds_one_package_and_its_files(pack, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)],
        cwd=pack, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode and "setuptools" in done.stderr:
        pytest.skip("this environment has no setuptools to build with")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"context_forcing", "context_forcing-0.1.0.dist-info"}
    expected = {
        f"context_forcing/{path.relative_to(ROOT)}"
        for room in ("commands", "memory", "model", "nodes", "train")
        for path in (ROOT / room).rglob("*.py")
    }
    assert expected <= set(names)
    for pattern in ("model/assets/*", "workflows/stories/*", "workflows/*.json"):
        for path in ROOT.glob(pattern):
            assert f"context_forcing/{path.relative_to(ROOT)}" in names
    assert "context_forcing/model/assets/demo_student.safetensors" in names
    assert any(name.startswith("context_forcing/workflows/") for name in names)
    assert not any("tests" in name or "runs/" in name for name in names)
