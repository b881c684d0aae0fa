"""Templates and blueprints are what scripts/make_workflows.py makes."""

import json
import subprocess
import sys

import pytest

from ..nodes.conftest import comfyui  # noqa: F401
from ..nodes.host import CHECKOUT
from .test_strip import no_browser

FOLDERS = ("workflows", "subgraphs")


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
            texts = [file.read_text(encoding="utf-8") for file in (path, kept[name])]
            assert json.loads(texts[0]) == json.loads(texts[1]), f"{folder}/{name}: run scripts/make_workflows.py"
