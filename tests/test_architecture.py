"""The arrows between the rooms point one way, and the house rules hold (architecture.md, style.md 1)."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("memory", "model", "nodes", "train", "commands")
FILES = sorted([*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))])
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

PACKAGES = {
    "memory": {"torch"},
    "memory/report.py": {"numpy", "PIL"},
    "memory/sheet.py": {"PIL"},
    "memory/snapshot.py": {"safetensors"},
    "model": {"torch", "einops", "safetensors", "numpy", "yaml"},
    "model/video.py": {"imageio_ffmpeg"},
    "model/umt5.py": {"ftfy", "sentencepiece", "tokenizers"},
    "model/doctor.py": {"imageio_ffmpeg"},
    "model/consistency.py": {"PIL"},
    "train": {"torch", "einops", "safetensors", "numpy", "yaml", "tqdm", "rich", "PIL"},
    "train/plots.py": {"matplotlib"},
    "train/lora.py": {"peft"},
    "train/encode.py": {"imageio_ffmpeg"},
    "train/consistency.py": {"imageio_ffmpeg", "transformers"},
    "nodes": {"torch", "numpy", "PIL", "comfy", "comfy_api", "folder_paths", "latent_preview", "nodes"},
    "nodes/storyboard.py": {"comfy_execution"},
    "cli.py": {"typer", "rich"},
    "commands": {"typer", "rich"},
    "__init__.py": set(),
}
"""What a room may import, and a file of it beyond that."""
ARROWS = {
    "memory": {"memory"},
    "model": {"model", "memory"},
    "nodes": {"nodes", "model", "memory"},
    "train": {"train", "model", "memory"},
    "cli.py": {"commands", "model", "memory", "train"},
    "commands": {"commands", "model", "memory", "train"},
    "__init__.py": {"nodes"},
}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path):
    return path.relative_to(ROOT).parts[0]


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
    room, name = room_of(path), str(path.relative_to(ROOT))
    for module, ours, _ in imports(path):
        if ours:
            target = module.split(".")[0]
            if name == "train/__main__.py" and target == "cli":
                continue
            assert target in ARROWS[room], f"{name} imports {module}"
        else:
            package = module.split(".")[0]
            assert package != "context_forcing", f"{name}: absolute imports break inside ComfyUI"
            allowed = PACKAGES[room] | PACKAGES.get(name, set()) | set(sys.stdlib_module_names)
            assert package in allowed, f"{name} imports {module}"


@pytest.mark.parametrize("name, target", [("cli.py", "train"), ("__init__.py", "nodes")])
def test_nodes_and_train_are_imported_late(name, target):
    late = [is_lazy for module, ours, is_lazy in imports(ROOT / name) if ours and module.split(".")[0] == target]
    assert late and all(late)


def test_the_model_knows_of_the_memory_what_it_needs():
    """The forward pass needs the view's type alone; sampler and pipeline hold whole memories; charts look alike."""
    allowed = {
        "model/causal.py": {"memory.view"},
        "model/config.py": {"memory.config"},
        "model/sampler.py": {"memory.memory", "memory.released", "memory.view"},
        "model/released.py": {"memory.config", "memory.released"},
        "model/finite.py": {"memory.memory", "memory.released"},
        "model/cards.py": {"memory.config"},
        "model/settings.py": {"memory.config"},
        "model/segment.py": {"memory.memory"},
        "model/journal.py": {"memory.memory"},
        "model/story.py": {"memory.memory"},
        "model/pipeline.py": {"memory.memory", "memory.config", "memory.released"},
        "model/probe.py": {"memory.memory", "memory.released"},
        "model/consistency.py": {"memory.sheet"},
    }
    for path in (ROOT / "model").rglob("*.py"):
        used = {module for module, ours, _ in imports(path) if ours and module.startswith("memory")}
        assert used <= allowed.get(str(path.relative_to(ROOT)), set()), path


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
    ]
    declared = {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in lines if line.strip()}
    imported_as = {"pyyaml": "yaml", "pillow": "PIL"}
    declared = {imported_as.get(name, name) for name in declared}
    for path in FILES:
        used = {module.split(".")[0] for module, ours, _ in imports(path) if not ours}
        comfyui = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "nodes"}
        missing = used - declared - set(sys.stdlib_module_names) - comfyui
        assert not missing, f"{path.relative_to(ROOT)}: {missing}"


def test_the_rules_of_memory_need_no_tensors():
    assert not any(module.startswith("torch") for module, *_ in imports(ROOT / "memory" / "policy.py"))
    assert not any(module.startswith("torch") for module, *_ in imports(ROOT / "memory" / "config.py"))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_house_rules(path):
    tree, text = tree_of(path), path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 420
    assert text.isascii()
    for node in ast.walk(tree):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "eval", "exec"), where
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            assert node.value not in (1560, 32760), f"{where}: sizes come from tensors"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"


def test_except_exception_only_at_comfyuis_door():
    names = lambda handler: {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)} if handler.type else set()
    broad = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler) and names(node) & {"Exception", "BaseException"}
    }
    assert broad <= {"__init__.py"}


@pytest.mark.parametrize("path", [f for f in FILES if room_of(f) == "model"], ids=lambda p: p.name)
def test_nothing_global_is_seeded(path):
    calls = [ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert not {"torch.manual_seed", "random.seed", "np.random.seed"} & set(calls)


def test_the_root_holds_the_door_and_the_command_only():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not {"example_workflows", "workflows"} <= {path.name for path in ROOT.iterdir()}
