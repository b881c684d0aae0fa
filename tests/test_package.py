"""What pip installs: built from a checkout, installed without one, its version, its licences and its speed."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest

from context_forcing.model.checkpoints.student import DEMO_STUDENT
from context_forcing.model.codecs.demo_vae import DEMO_CODEC

from .nodes.host import NODE_IDS
from .test_comfy_load import SHIPPED, load_pack

ROOT = Path(__file__).parents[1]
NOT_SHIPPED = ("tests/", "scripts/")
NODE_FILES = ("locales", "subgraphs", "web", "workflows")
WHEEL_BYTES = 16e6
NOT_PYTHON = ("torch", "numpy", "yaml", "PIL", "safetensors", "transformers", "matplotlib", "comfy")


def checked_out() -> list[str]:
    """The files that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_stands_in_one_file(project):
    version = project["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version), "what the ComfyUI registry takes"
    first, *_ = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert first in (version, "Unreleased"), "CHANGELOG.md begins with this version, or with what is not tagged yet"
    code = [ROOT / name for name in checked_out() if name.endswith((".py", ".js", ".mjs", ".json", ".yml", ".sh"))]
    others = [path.name for path in code if re.search(rf"""["']{re.escape(version)}["']""", path.read_text("utf-8"))]
    assert not others, "they read it from the package"


def test_an_import_is_fast_and_without_torch(tmp_path):
    script = (
        "import json, sys, time\n"
        "began = time.process_time()\n"
        "import context_forcing, context_forcing.cli\n"
        "print(json.dumps([time.process_time() - began, list(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    assert seconds < 1 and not {module.split(".")[0] for module in modules} & set(NOT_PYTHON)


def test_the_names_of_memory_are_imported_when_they_are_used():
    import context_forcing.memory as memory

    assert {name: getattr(memory, name).__name__ for name in memory.__all__} == {name: name for name in memory.__all__}
    with pytest.raises(AttributeError, match="has no attribute 'Memories'"):
        memory.Memories


def test_every_dependency_has_its_licence(project):
    """docs/licences.md names what the project needs, and the licence that the installed package states."""
    lines = (ROOT / "requirements.txt").read_text().splitlines() + project["build-system"]["requires"]
    lines += [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    needed = {re.match(r"[\w.-]+", line)[0] for line in lines if line.strip()} - {project["project"]["name"]}
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in page.splitlines() if line[:1] == "|"]
    licences = {package: licence for package, _, licence in rows[2:]}
    assert set(licences) == needed
    checked = 0
    for package, licence in licences.items():
        try:
            stated = metadata(package)
        except PackageNotFoundError:
            continue
        fields = stated["License-Expression"], stated["License"], *stated.get_all("Classifier", [])
        text = " ".join(filter(None, fields))
        family = {"PSF": "Python Software Foundation"}.get(licence, re.match(r"[A-Z]+|Apache", licence)[0])
        assert family in text, f"{package}: {licence}"
        checked += 1
    assert checked > len(licences) / 2


def test_the_model_card_is_that_of_the_files():
    card = (ROOT / "docs" / "demo_student.md").read_text(encoding="utf-8")
    for path in (DEMO_STUDENT, DEMO_CODEC):
        assert f"`{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}`" in card, (
            "docs/demo_student.md is of other files"
        )
    for row in ("intended use", "not for", "training", "how it was trained", "data", "figures", "licence"):
        assert re.search(rf"^\| {row} \| .{{8,}}", card, re.M), row
    assert re.search(r"^## Limits$", card, re.M)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source archive, and the wheel that is built from it."""
    pytest.importorskip("build", reason="the extra dev is not installed")
    pytest.importorskip("setuptools", reason="the extra dev is not installed")
    folder = tmp_path_factory.mktemp("package")
    for name in checked_out():
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "checkout" / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "checkout")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built) -> Path:
    """An environment with the wheel. What it needs is that of this environment, whose checkout it does not see."""
    environment = built / "clean"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = next(path for path in (environment / "bin/python", environment / "Scripts/python.exe") if path.exists())
    (wheel,) = built.glob("*.whl")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (Path(site.stdout.strip()) / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, *arguments: str, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(python), *arguments], cwd=cwd, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_one_package_with_the_files_of_the_nodes(built, project):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"context_forcing-{project['project']['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"context_forcing", info}
    assert f"{info}/licenses/LICENSE" in names
    files = [name for name in checked_out() if not name.startswith(NOT_SHIPPED)]
    rooms = {name.split("/")[0] for name in files if name.endswith(".py")}
    shipped = tuple(room if room.endswith(".py") else f"{room}/" for room in (*rooms, *NODE_FILES))
    expected = {f"context_forcing/{name}" for name in files if name.startswith(shipped)}
    assert {name for name in names if not name.startswith(info)} == expected
    for name in ("model/assets/demo_student.safetensors", "web/strip.js", "locales/zh/nodeDefs.json"):
        assert f"context_forcing/{name}" in names
    assert wheel.stat().st_size < WHEEL_BYTES


@pytest.mark.slow
def test_the_source_archive_holds_no_tests(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        folders = {name.split("/")[1] for name in file.getnames() if "/" in name}
    assert set(SHIPPED) <= folders and not folders & {"tests", "docs", "scripts", ".github"}


@pytest.mark.slow
def test_the_installed_command_runs_without_a_checkout(built, installed, project):
    command = ("-m", "context_forcing.cli")
    assert run(installed, *command, "--version", cwd=built) == f"context-forcing {project['project']['version']}\n"
    file = run(installed, "-c", "import context_forcing; print(context_forcing.__file__)", cwd=built)
    assert Path(file.strip()).is_relative_to(built / "clean")
    (built / "story.yaml").write_text("size: [32, 32]\nsegments: [{prompt: A meadow by day., seconds: 0.75}]\n")
    run(installed, *command, "generate", "story.yaml", "-o", "film.mp4", cwd=built)
    assert (built / "film.mp4").stat().st_size > 1000


@pytest.mark.slow
def test_the_installed_folder_is_a_node_pack(built, installed):
    (folder,) = (built / "clean").rglob("site-packages/context_forcing")
    done = load_pack(folder, built)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ids"] == list(NODE_IDS) and result["web"]
