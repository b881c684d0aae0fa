"""Writes what is derived from the schemas of the nodes: locales/en/nodeDefs.json.

python scripts/describe_nodes.py      (after every change of a text of a node)
"""

import asyncio
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STUBS = ROOT / "tests" / "nodes" / "comfyui_stub.py"
ENGLISH = ROOT / "locales" / "en" / "nodeDefs.json"


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


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    ENGLISH.write_text(as_json(english(load_schemas())), encoding="utf-8")


if __name__ == "__main__":
    main()
