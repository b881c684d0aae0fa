"""Templates and blueprints are what scripts/make_workflows.py makes."""

import json
import subprocess
import sys

import pytest

from ..nodes.conftest import comfyui  # noqa: F401
from ..nodes.host import CHECKOUT
from .test_strip import no_browser

FOLDERS = ("workflows", "subgraphs")


def without_layout(graph):
    """A graph without the boxes of a subgraph's ends. They follow from measured text and vary by 2 pixels."""
    for subgraph in graph.get("definitions", {}).get("subgraphs", []):
        for end in ("inputNode", "outputNode"):
            del subgraph[end]["bounding"]
    return graph


@pytest.mark.browser
@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(no_browser() is not None, reason=str(no_browser()))
def test_one_command_makes_templates_and_blueprints(comfyui, tmp_path):  # noqa: F811
    command = [sys.executable, CHECKOUT / "scripts" / "make_workflows.py", "--to", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder in FOLDERS:
        made, kept = ({path.name: path for path in (root / folder).glob("*.json")} for root in (tmp_path, CHECKOUT))
        assert made.keys() == kept.keys()
        for name, path in made.items():
            graphs = [without_layout(json.loads(file.read_text(encoding="utf-8"))) for file in (path, kept[name])]
            assert graphs[0] == graphs[1], f"{folder}/{name}: run scripts/make_workflows.py"
