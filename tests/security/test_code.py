"""What the code may call (docs/security.md): no unpickling, no shell, no code from text, no network."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("benchmark", "cli", "memory", "model", "nodes", "scripts", "train", "video", "workers")
FILES = sorted([*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))])
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

NETWORK = {"urllib", "http", "requests", "httpx", "ftplib", "smtplib", "ssl", "huggingface_hub", "xmlrpc", "telnetlib"}
CODE = {"eval", "exec", "compile", "__import__", "execfile", "input"}
"""Builtins that run or wait for text."""
FORBIDDEN = {
    "os.system", "os.popen", "os.startfile", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn",
    "pickle.load", "pickle.loads", "marshal.loads", "marshal.load", "shelve.open", "numpy.load", "np.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "torch.jit.load",
}  # fmt: skip
MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "ctypes", "code", "pty"}
UNPICKLERS = {"train/checkpoints.py"}
"""Where a pickle is read by a class that knows the names in it; tests/train/test_checkpoints.py."""


def wrong_calls(text: str) -> list[str]:
    """What a source text must not do, with its line."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names: set[str] = set()
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names} & (NETWORK | MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            names = {module.split(".")[0]} & (NETWORK | MODULES)
            names |= {f"{module}.{alias.name}" for alias in node.names} & (FORBIDDEN | {"pickle.Unpickler"})
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in CODE:
            names = {node.id}
        elif isinstance(node, ast.Attribute):
            called = ast.unparse(node)
            is_network = called.startswith("socket.") and called != "socket.gethostname"
            is_process = called.startswith(("os.exec", "os.spawn", "os.posix_spawn"))
            names = {called} if called in {*FORBIDDEN, "pickle.Unpickler"} or is_network or is_process else set()
        elif isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            names = {"shell"} & given.keys() | {name for name in ("allow_pickle", "trust_remote_code") if name in given}
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") != "True":
                names.add("torch.load without weights_only=True")
        found += [f"line {node.lineno}: {name}" for name in sorted(names)]
    return found


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_unpickling_no_shell_no_code_from_text_no_network(path):
    """The node pack's route is on ComfyUI's own server; `socket` only names this machine."""
    allowed = "pickle.Unpickler" if str(path.relative_to(ROOT)) in UNPICKLERS else ""
    found = [each for each in wrong_calls(path.read_text(encoding="utf-8")) if not each.endswith(f": {allowed}")]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')", "exec('1')", "run = eval", "__import__('os')", "import os\nos.system('ls')",
        "from os import system",
        "subprocess.run('ls', shell=True)", "subprocess.getoutput('ls')", "os.execv('ls', [])", "import requests",
        "from urllib.request import urlopen", "socket.create_connection(x)", "torch.load(f)", "pickle.loads(b'')",
        "torch.load(f, weights_only=False)", "from pickle import loads", "class A(pickle.Unpickler): pass",
        "yaml.load(f, yaml.Loader)", "np.load(f, allow_pickle=True)", "from_pretrained(f, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_scan_finds(text):
    assert wrong_calls(text)


OFFLINE = """
import importlib, os, pkgutil, sys
started = []
NETWORK = tuple(f"socket.{name}" for name in ("connect", "bind", "getaddrinfo", "gethostbyname", "sendto"))
def watch(event, args):
    if event in NETWORK:
        raise SystemExit(f"network: {event} {args}")
    if event in ("os.system", "os.exec", "os.posix_spawn", "pty.spawn"):
        raise SystemExit(f"a program: {event} {args}")
    if event == "subprocess.Popen":
        started.append(os.path.basename(os.fspath(args[1][0])))
sys.addaudithook(watch)
import context_forcing
folder = os.path.dirname(context_forcing.__file__)
for room in ("cli", "memory", "model", "train", "video", "workers", "nodes"):
    if room == "nodes":
        sys.path.insert(0, os.path.join(folder, "tests", "nodes"))
        import comfyui_stub
        comfyui_stub.install()
        comfyui_stub.define_types()
    importlib.import_module(f"context_forcing.{room}")
    for module in pkgutil.walk_packages([os.path.join(folder, room)], f"context_forcing.{room}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
from context_forcing import cli
sys.argv = ["context-forcing", "generate", "story.yaml", "-o", "film.mp4", "--student", sys.argv[1], "--scale", "1"]
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end.code
programs = sorted({name.split("-")[0].split(".")[0] for name in started})
print(programs, len([name for name in sys.modules if "context_forcing" in name]))
"""


@pytest.mark.slow
def test_no_network_at_import_or_run_time(tmp_path, student):
    """Everything is imported and a chunk is generated in a process without network; it starts ffmpeg and git alone."""
    (tmp_path / "story.yaml").write_text("size: [48, 32]\nsegments: [{prompt: a meadow, seconds: 0.75}]\n")
    command = [sys.executable, "-c", OFFLINE, str(student)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    programs, count = done.stdout.strip().splitlines()[-1].rsplit(" ", 1)
    assert programs in ("['ffmpeg', 'git']", "['ffmpeg']") and int(count) > 100
    assert (tmp_path / "film.mp4").stat().st_size
