"""What the ComfyUI registry reads: fields of pyproject.toml, their pictures, and what its package leaves out."""

from pathlib import Path

import pytest
from PIL import Image

from .test_comfy_load import SHIPPED

ROOT = Path(__file__).parents[1]
RAW = "https://raw.githubusercontent.com/ComfyUI-ContextForcing/ComfyUI-ContextForcing/main/"


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_field_has_a_value(project):
    comfy = project["tool"]["comfy"]
    assert all(comfy[name] for name in ("PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"))
    assert "comfyui" not in project["project"]["name"]
    assert {"Repository", "Documentation", "Issues"} <= project["project"]["urls"].keys()


@pytest.mark.parametrize(("field", "ratio"), [("Icon", 1), ("Banner", 21 / 9)])
def test_its_pictures_are_in_the_repository(project, field, ratio):
    address = project["tool"]["comfy"][field]
    path = ROOT / address.removeprefix(RAW)
    assert address.startswith(RAW) and path.stat().st_size < 50_000
    width, height = Image.open(path).size
    assert width / height == pytest.approx(ratio, rel=0.01) and max(width, height) <= 1024


def test_the_package_leaves_out_nothing_that_the_nodes_need():
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns and all(line.startswith("/") and (ROOT / line[1:]).exists() for line in patterns)
    assert not {line[1:] for line in patterns} & set(SHIPPED)
