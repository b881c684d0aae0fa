"""Schemas of the nodes without ComfyUI: permanent ids and inputs, tooltips, help pages, workflows that fit."""

import json

import pytest

from .host import CHECKOUT, NODE_IDS

STORAGE = "keep_in=RAM? autosave=False? layout=at_once?"
INPUTS = {
    "ContextForcingLoadDemo": "",
    "ContextForcingLoadStudent": "student weights=auto? card=auto?",
    "ContextForcingMemory": "model width=0 height=0 policy=as_trained sink=-1 slow=-1 fast=-1 threshold=-1.0"
    " preset=as_trained?",
    "ContextForcingRemember": "memory vae? images? latent?",
    "ContextForcingReference": "memory vae images positive?",
    "ContextForcingSampler": "model positive memory seconds=3.0 seed=0 attention=sdpa? commit_attends=card?"
    f" change=keep? blend=0? {STORAGE} kv_dtype=auto?",
    "ContextForcingStoryboard": "model clip memory text=EXAMPLE seed=0 attention=sdpa?"
    f" {STORAGE} branch_after=0? kv_dtype=auto?",
    "ContextForcingSaveVideo": "memory vae filename_prefix=video/context_forcing fps=16.0 scale=0 crf=16?",
    "ContextForcingMemoryReport": "memory vae fps=16.0 model?",
    "ContextForcingConsistency": "memory? vae? images? clip_vision? every=1.0 fps=16.0",
    "ContextForcingSaveMemory": "memory filename_prefix=context_forcing/memory form=exact",
    "ContextForcingLoadMemory": "file",
    "ContextForcingStudentSettings": "model steps= shift=0.0 solver=as_is fps=0 chunk=-1 window=-1 sink=-1 slow=-1"
    " fast=-1 card=as_is?",
}
"""Name, default and `?` for an optional input, in order. Saved workflows depend on them: they are only appended to."""


SHOWN = {
    "ContextForcingLoadStudent": "student card",
    "ContextForcingMemory": "width height",
    "ContextForcingSampler": "seconds seed change blend",
    "ContextForcingStoryboard": "text seed",
    "ContextForcingSaveVideo": "filename_prefix fps",
    "ContextForcingConsistency": "every",
    "ContextForcingSaveMemory": "filename_prefix form",
    "ContextForcingLoadMemory": "file",
    "ContextForcingStudentSettings": "steps shift card",
}
"""Inputs with a value that are not advanced: what a beginner sees."""


def described(entry) -> str:
    default = getattr(entry, "default", None)
    text = "" if default is None else f"={'EXAMPLE' if '#' in str(default) else str(default).replace(' ', '_')}"
    return entry.id + text + ("?" if getattr(entry, "optional", False) else "")


def test_there_are_these_nodes(schemas):
    assert tuple(schemas) == NODE_IDS == tuple(INPUTS)


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_inputs_keep_names_defaults_and_order(schemas, node_id):
    assert " ".join(map(described, schemas[node_id].inputs)) == INPUTS[node_id]


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_a_beginner_sees_few_inputs(schemas, node_id):
    values = [entry for entry in schemas[node_id].inputs if hasattr(entry, "default") or hasattr(entry, "options")]
    shown = [entry.id for entry in values if not getattr(entry, "advanced", False)]
    assert " ".join(shown) == SHOWN.get(node_id, "")


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_everything_is_described(schemas, node_id):
    schema = schemas[node_id]
    assert schema.category == "Context Forcing" and schema.display_name and len(schema.description) > 20
    for entry in [*schema.inputs, *schema.outputs]:
        assert len(entry.tooltip) > 5 and entry.tooltip.endswith("."), entry.id


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_the_help_page_has_every_input_and_output(schemas, node_id):
    schema = schemas[node_id]
    page = (CHECKOUT / "web" / "docs" / f"{node_id}.md").read_text()
    assert page.startswith(f"# {schema.display_name}\n")
    for entry in [*schema.inputs, *schema.outputs]:
        assert f"**{entry.id}**" in page, entry.id


@pytest.mark.parametrize("path", sorted((CHECKOUT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_workflows_fit_the_schemas(schemas, path):
    for node in json.loads(path.read_text())["nodes"]:
        if node["type"].startswith("ContextForcing"):
            names = [entry.id for entry in schemas[node["type"]].inputs]
            widgets = [entry["name"] for entry in node["inputs"] if "widget" in entry]
            assert [name for name in names if name in widgets] == widgets
            assert {entry["name"] for entry in node["inputs"]} <= set(names)


def test_the_scripts_that_make_the_workflows_have_their_notes():
    scripts = "".join(path.read_text(encoding="utf-8") for path in (CHECKOUT / "scripts" / "workflows").glob("*.mjs"))
    scripts = scripts.replace("\\`", "`").replace("\\'", "'").replace("\\n", "\n")
    for path in (CHECKOUT / "workflows").glob("*.json"):
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        notes = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
        missing = [line for note in notes for line in note.splitlines() if line.removeprefix("## ") not in scripts]
        assert notes and not missing, f"{path.name}: run scripts/make_workflows.py"
