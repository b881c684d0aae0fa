"""tests/host, run once by ComfyUI's Python: each of its tests is reported here under its name."""

import ast
import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = [pytest.mark.host, pytest.mark.slow]

FOLDER = Path(__file__).parents[1] / "host"
TESTS = [
    f"{path.stem}::{function.name}"
    for path in sorted(FOLDER.glob("test_*.py"))
    for function in ast.parse(path.read_text()).body
    if isinstance(function, ast.FunctionDef) and function.name.startswith("test_")
]


@pytest.fixture(scope="session")
def cases(comfyui, tmp_path_factory) -> dict[str, list[ElementTree.Element]]:
    """Results by test; a test with parameters has several."""
    python = [str(comfyui.python), "-m", "pytest"]
    if subprocess.run([*python, "--version"], capture_output=True).returncode:
        pytest.skip(f"no pytest for {comfyui.python}; run scripts/install_comfyui_env.sh")
    report = tmp_path_factory.mktemp("host") / "report.xml"
    done = subprocess.run(
        [*python, str(FOLDER), f"--junitxml={report}"], capture_output=True, text=True, timeout=600,
        env={**os.environ, "COMFYUI_PATH": str(comfyui.path)},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    cases = {}
    for case in ElementTree.parse(report).iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2]
        cases.setdefault(f"{module}::{case.get('name', '').partition('[')[0]}", []).append(case)
    return cases


@pytest.mark.parametrize("name", TESTS)
def test_inside_comfyui(cases, name):
    results = [result for case in cases[name] for result in case if result.tag in ("failure", "error", "skipped")]
    failures = [result.text for result in results if result.tag != "skipped"]
    assert not failures, "\n".join(map(str, failures))
    if results:
        pytest.skip(str(results[0].get("message")))
