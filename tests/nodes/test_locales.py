"""Texts of the nodes in ComfyUI's languages: complete, none left over; the English ones are those of the schemas."""

import importlib.util
import json
import re

import pytest

from .host import CHECKOUT

LOCALES = CHECKOUT / "locales"
FILES = ("nodeDefs", "main", "settings", "commands")
SCRIPT = {"zh": re.compile("[\u4e00-\u9fff]")}
"""Characters that a text in the language has, unless it is one of NAMES."""
NAMES = {"CLIP", "VAE", "Latent"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("describe_nodes", CHECKOUT / "scripts" / "describe_nodes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(value, path=()) -> dict[tuple, str]:
    if not isinstance(value, dict):
        return {path: value}
    return {key: text for name, part in value.items() for key, text in leaves(part, (*path, name)).items()}


def texts(language: str, file: str) -> dict[tuple, str]:
    path = LOCALES / language / f"{file}.json"
    return leaves(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def test_english_texts_are_those_of_the_schemas(script, schemas):
    path = LOCALES / "en" / "nodeDefs.json"
    assert path.read_text(encoding="utf-8") == script.as_json(script.english(list(schemas.values()))), (
        "run python scripts/describe_nodes.py"
    )


def test_the_checklist_of_nodes_is_complete(script, schemas):
    written = (CHECKOUT / "docs" / "nodes.md").read_text(encoding="utf-8")
    assert written == script.checklist(list(schemas.values())), "run python scripts/describe_nodes.py"
    rows = [line for line in written.splitlines() if line.startswith("| `")]
    missing = [line for line in rows if "no" in (cell.strip() for cell in line.split("|"))]
    assert len(rows) == len(schemas) and not missing, "\n".join(missing)


def test_chinese_is_there():
    assert {"en", "zh"} <= {path.name for path in LOCALES.iterdir()}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("language", sorted(path.name for path in LOCALES.iterdir() if path.name != "en"))
def test_a_language_has_the_keys_of_english(language, file):
    english, translated = texts("en", file), texts(language, file)
    assert not english.keys() - translated.keys(), f"{language}/{file}.json lacks these"
    assert not translated.keys() - english.keys(), f"{language}/{file}.json has these, English has not"


@pytest.mark.parametrize("language", SCRIPT)
def test_texts_are_translated(language):
    for file in FILES:
        for key, text in texts(language, file).items():
            assert text in NAMES or SCRIPT[language].search(text), f"{language}/{file}.json {key}: {text}"


@pytest.mark.parametrize("language", sorted(path.name for path in LOCALES.iterdir()))
def test_texts_hold_no_syntax_of_messages(language):
    """In ComfyUI's page these characters begin a variable, a link or a plural; {'@'} is the character itself."""
    for file in FILES:
        for key, text in texts(language, file).items():
            assert not re.search(r"[{}@$|]", re.sub(r"\{'.'\}", "", text)), f"{language}/{file}.json {key}: {text}"


@pytest.mark.host
@pytest.mark.slow
def test_comfyui_serves_them(host):
    served = host.get("/i18n")
    for language in ("en", "zh"):
        for file in ("nodeDefs", "main"):
            root = served[language]["nodeDefs"] if file == "nodeDefs" else served[language]
            assert texts(language, file).items() <= leaves(root).items()
