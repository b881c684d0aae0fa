"""The arrows between the rooms point one way (docs/architecture.md, Arrows), and the rules of CONTRIBUTING.md hold."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("memory", "model", "workers", "video", "benchmark", "nodes", "train", "cli")
FILES = sorted([*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))])
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

PACKAGES = {
    "memory": {"torch", "safetensors"},
    "model": {"torch", "einops"},
    "model/checkpoints": {"torch", "safetensors", "yaml"},
    "model/codecs": {"torch", "einops", "ftfy", "sentencepiece", "tokenizers"},
    "model/settings.py": {"yaml"},
    "workers/ray_workers.py": {"ray"},
    "workers": {"torch"},
    "video": {"torch", "numpy", "safetensors", "yaml", "PIL", "imageio_ffmpeg"},
    "benchmark": {"torch", "einops", "rich"},
    "train": {"torch", "safetensors", "numpy", "yaml", "tqdm", "rich", "PIL", "peft"},
    "train/stages": {"torch", "einops", "safetensors", "numpy", "PIL"},
    "train/data": {"torch", "einops", "safetensors", "numpy"},
    "train/evaluation": {"torch", "numpy", "rich", "PIL", "matplotlib", "transformers"},
    "train/world": {"numpy"},
    "nodes/storyboard_route.py": {"aiohttp", "server"},
    "nodes/page.py": {"comfy_api", "comfy_execution", "server"},
    "nodes": {"torch", "numpy", "PIL", "comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview"},
    "cli": {"typer", "rich", "torch", "yaml"},
    "__init__.py": set(),
}
"""What a room may import: the entry of the file, of its folder, or of the room, the first there is."""
BELOW = ("memory", "model", "model/checkpoints", "model/codecs", "workers", "video")
"""Rooms from the lowest up; each imports itself and those before it."""
ARROWS = {
    **{room: BELOW[: place + 1] for place, room in enumerate(BELOW)},
    "nodes": ("nodes", *BELOW),
    "train": ("train", *BELOW),
    "benchmark": ("benchmark", *BELOW),
    "cli": ("cli", "benchmark", "train", *BELOW),
    "__init__.py": ("nodes",),
}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path, rooms=ARROWS):
    """The innermost room that a file, or a module as a path, lies in."""
    parts = path.parts
    return next(room for n in range(len(parts), 0, -1) if (room := "/".join(parts[:n])) in rooms)


def imports(path):
    """(module, is ours, inside a function) of every import; ours as a path from the root, for example memory.view."""
    tree = tree_of(path)
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, False, id(node) in lazy
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, False, id(node) in lazy
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - (node.level - 1)]
            assert len(package) >= node.level - 1, f"{path}: leaves the package"
            for name in node.names:
                yield ".".join([*base, *(node.module or name.name).split(".")]), True, id(node) in lazy


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_arrows(path):
    name = path.relative_to(ROOT)
    for module, ours, _ in imports(path):
        if ours:
            target = room_of(Path(*module.split(".")))
            assert target in ARROWS[room_of(name)], f"{name} imports {module}"
        else:
            package = module.split(".")[0]
            assert package != "context_forcing", f"{name}: absolute imports break inside ComfyUI"
            allowed = PACKAGES[room_of(name, PACKAGES)] | set(sys.stdlib_module_names)
            assert package in allowed, f"{name} imports {module}"


@pytest.mark.parametrize("room, target", [("cli", "train"), ("__init__.py", "nodes")])
def test_nodes_and_train_are_imported_late(room, target):
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] == room]
    late = [lazy for f in files for module, ours, lazy in imports(f) if ours and module.split(".")[0] == target]
    assert late and all(late)


def test_what_is_imported_is_declared():
    """ComfyUI's own packages come with ComfyUI; everything else stands in requirements.txt or an extra."""
    project = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader").loads(
        (ROOT / "pyproject.toml").read_text()
    )
    extras = project["project"]["optional-dependencies"]
    lines = [
        *(ROOT / "requirements.txt").read_text().splitlines(),
        *extras["headless"],
        *extras["train"],
        *extras["wan"],
        *extras["encode"],
        *extras["ray"],
    ]
    declared = {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in lines if line.strip()}
    imported_as = {"pyyaml": "yaml", "pillow": "PIL"}
    declared = {imported_as.get(name, name) for name in declared}
    for path in FILES:
        used = {module.split(".")[0] for module, ours, _ in imports(path) if not ours}
        comfyui = {
            "comfy",
            "comfy_api",
            "comfy_execution",
            "folder_paths",
            "latent_preview",
            "nodes",
            "server",
            "aiohttp",
        }
        missing = used - declared - set(sys.stdlib_module_names) - comfyui
        assert not missing, f"{path.relative_to(ROOT)}: {missing}"


def test_the_rules_of_memory_need_no_tensors():
    assert not any(module.startswith("torch") for module, *_ in imports(ROOT / "memory" / "policy.py"))
    assert not any(module.startswith("torch") for module, *_ in imports(ROOT / "memory" / "config.py"))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_house_rules(path):
    tree, text = tree_of(path), path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert text.isascii()
    for node in ast.walk(tree):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", where
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            assert node.value not in (1560, 32760), f"{where}: sizes come from tensors"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{where}: {node.name} is too long"


def test_except_exception_only_at_comfyuis_door_and_around_a_kernel_under_test():
    names = lambda handler: {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)} if handler.type else set()
    broad = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler) and names(node) & {"Exception", "BaseException"}
    }
    assert broad <= {"__init__.py", "model/attention.py"}


@pytest.mark.parametrize("path", [f for f in FILES if f.relative_to(ROOT).parts[0] == "model"], ids=lambda p: p.name)
def test_nothing_global_is_seeded(path):
    calls = [ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert not {"torch.manual_seed", "random.seed", "np.random.seed"} & set(calls)


def test_the_root_holds_the_entry_point_only():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py"}
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not {"example_workflows", "workflows"} <= {path.name for path in ROOT.iterdir()}
