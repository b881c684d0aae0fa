"""Writes what is derived from the schemas of the nodes: locales/en/nodeDefs.json and docs/nodes.md.

python scripts/describe_nodes.py      (after every change of a text of a node, a template or a help page)
"""

import asyncio
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STUBS = ROOT / "tests" / "nodes" / "comfyui_stub.py"
ENGLISH = ROOT / "locales" / "en" / "nodeDefs.json"
HELP = ROOT / "web" / "docs"
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")
CHECKLIST = ROOT / "docs" / "nodes.md"
LISTS_OF_ALL = ("host.py", "test_schemas.py")
"""Files of tests/nodes that name every node and run none."""
HEAD = """# Nodes: what each one has

Written by `scripts/describe_nodes.py`; a test fails where something is missing. *zh help* is the Chinese help page,
whose picture is shown in ComfyUI only.
*tooltips* counts inputs and outputs that have one, *templates* the templates and blueprints with the node, *tests* the
files of tests that run it.

| node | help | zh help | picture | tooltips | en | zh | templates | tests |
|---|---|---|---|---|---|---|---|---|
"""


def load_schemas() -> list[Any]:
    """Schemas of the nodes, read with stand-ins for ComfyUI's modules."""
    spec = importlib.util.spec_from_file_location("comfyui_stub", STUBS)
    assert spec and spec.loader
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    stub.install()
    stub.define_types()
    from context_forcing.nodes import ContextForcingExtension

    return [node.define_schema() for node in asyncio.run(ContextForcingExtension().get_node_list())]


def message(text: str) -> str:
    """A text as a message of vue-i18n, in which these characters have a meaning of their own."""
    return re.sub(r"[{}@$|]", lambda special: f"{{'{special[0]}'}}", text)


def english(schemas: list[Any]) -> dict[str, Any]:
    """The texts of all nodes, keyed as in ComfyUI's nodeDefs.json; outputs by their number."""
    words = lambda entry: {
        "name": getattr(entry, "display_name", None) or entry.id,
        "tooltip": message(entry.tooltip),
    }
    return {
        schema.node_id: {
            "display_name": schema.display_name,
            "description": message(schema.description),
            "inputs": {entry.id: words(entry) for entry in schema.inputs},
            "outputs": {str(number): words(entry) for number, entry in enumerate(schema.outputs)},
        }
        for schema in schemas
    }


def has_texts(language: str, schema: Any) -> bool:
    """A language has a text for the node, its inputs and its outputs."""
    path = ROOT / "locales" / language / "nodeDefs.json"
    texts = json.loads(path.read_text(encoding="utf-8")).get(schema.node_id, {})
    inputs, outputs = [entry.id for entry in schema.inputs], [str(number) for number in range(len(schema.outputs))]
    words = [texts.get("inputs", {}).get(name, {}) for name in inputs]
    words += [texts.get("outputs", {}).get(number, {}) for number in outputs]
    named = texts.get("display_name") and texts.get("description")
    return bool(named and all(word.get("name") and word.get("tooltip") for word in words))


def help_text(node: str, language: str = "") -> str:
    """The help page of a node, as ComfyUI's page looks for it; empty if there is none."""
    page = HELP / node / f"{language}.md" if language else HELP / f"{node}.md"
    return page.read_text(encoding="utf-8") if page.is_file() else ""


def translated_help(schema: Any, language: str) -> str:
    """A link to the help page in a language; `no` unless it has the pictures of the English one, and all names.

    Names are those that the node, its inputs and its outputs have in the language, each with its id behind it.
    """
    english, text = help_text(schema.node_id), help_text(schema.node_id, language)
    path = ROOT / "locales" / language / "nodeDefs.json"
    words = json.loads(path.read_text(encoding="utf-8")).get(schema.node_id, {})
    entries = [(entry.id, words.get("inputs", {}).get(entry.id, {})) for entry in schema.inputs]
    entries += [(entry.id, words.get("outputs", {}).get(str(i), {})) for i, entry in enumerate(schema.outputs)]
    has_names = all(f"**{word.get('name')}**\uff08`{name}`" in text for name, word in entries)
    has_title = text.startswith(f"# {words.get('display_name')}\n")
    if not (has_names and has_title and PICTURE.findall(text) == PICTURE.findall(english)):
        return "no"
    return f"[{words['display_name']}](../web/docs/{schema.node_id}/{language}.md)"


def files_with(text: str, paths: Iterable[Path]) -> int:
    return sum(text in path.read_text(encoding="utf-8") for path in paths)


def row(schema: Any) -> list[str]:
    """A line of the checklist; `no` is what is missing."""
    node, entries = schema.node_id, [*schema.inputs, *schema.outputs]
    text = help_text(node)
    pictures = PICTURE.findall(text)
    shown = pictures and all((HELP / picture).is_file() for picture in pictures)
    graphs = [path for folder in ("workflows", "subgraphs") for path in (ROOT / folder).glob("*.json")]
    folders = [ROOT / "tests" / "nodes", ROOT / "tests" / "host"]
    tests = [path for folder in folders for path in folder.glob("*.py") if path.name not in LISTS_OF_ALL]
    described = sum(bool(entry.tooltip) for entry in entries)
    return [
        f"`{node}`",
        f"[{schema.display_name}](../web/docs/{node}.md)" if text else "no",
        translated_help(schema, "zh"),
        "yes" if shown else "no",
        str(described) if described == len(entries) else "no",
        *("yes" if has_texts(language, schema) else "no" for language in ("en", "zh")),
        str(files_with(f'"{node}"', graphs) or "no"),
        str(files_with(node, tests) or "no"),
    ]


def checklist(schemas: list[Any]) -> str:
    return HEAD + "".join(f"| {' | '.join(row(schema))} |\n" for schema in schemas)


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    schemas = load_schemas()
    ENGLISH.write_text(as_json(english(schemas)), encoding="utf-8")
    CHECKLIST.write_text(checklist(schemas), encoding="utf-8")


if __name__ == "__main__":
    main()
