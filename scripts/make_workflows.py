"""Makes the templates and blueprints: workflows/*.json and subgraphs/*.json, as ComfyUI's page saves them.

PLAYWRIGHT_CORE=FOLDER python scripts/make_workflows.py [--to FOLDER] [NAME ...]

It starts a ComfyUI, as the tests do, with tiny model files under the names that the templates have. It drives its page
in Chromium (`CHROMIUM`, default /usr/bin/chromium). `PLAYWRIGHT_CORE` is a folder that has playwright-core of npm. NAME
is a template or a blueprint; default: all. What they contain is in scripts/workflows.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "nodes"


def module(name: str) -> ModuleType:
    """A module of tests/nodes."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec and spec.loader
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def make(address: str, folder: Path, names: list[str]) -> None:
    """Let the page of a running ComfyUI make workflows and blueprints in a folder. Raises CalledProcessError."""
    command = ["node", ROOT / "scripts" / "workflows" / "make.mjs", f"http://{address}", folder, *names]
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT, help="folder for workflows/ and subgraphs/; default: here")
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    server, models = module("host"), module("tiny_models")
    comfyui = server.find_comfyui()
    if isinstance(comfyui, str):
        sys.exit(comfyui)
    with tempfile.TemporaryDirectory() as base:
        models.write_tiny_models(Path(base))
        host = server.Host(comfyui, Path(base), packs=[TESTS / "tiny_umt5"])
        host.start()
        try:
            make(host.address, options.to.absolute(), options.names)
        finally:
            host.stop()


if __name__ == "__main__":
    main()
