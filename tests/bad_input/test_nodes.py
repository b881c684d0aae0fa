"""Every input of every node with a value, as ComfyUI checks and calls them; its modules are stubs."""

import asyncio
import dataclasses
import math
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.memory.snapshot import save_memory
from context_forcing.model.config import StudentCard

from .drill import SCALARS, TEXTS, drill, is_line, tried, used_or_refused
from .drill import refused as refused_ones

CARD = StudentCard(base="demo", size=(48, 32))
STUDENTS = {
    "noise.safetensors": bytes(99),
    "noise.pt": b"PK\x03\x04" + bytes(99),
    "a" * 200 + ".gguf": b"GGUF" + bytes(9),
}
BOARD = "0:00 A meadow.\n0:03 [cut seed=3] A desert.\n0:06"


def comfyui_value(entry, value):
    """A value of a prompt as ComfyUI converts and limits it; None where it refuses the prompt."""
    kind = entry.kind
    try:
        if kind == "Int":
            value = int(value)
        elif kind == "Float":
            value = float(value)
        elif kind == "String":
            value = str(value)
        elif kind == "Boolean":
            value = bool(value)
    except (ValueError, TypeError, OverflowError):
        return None
    if kind in ("Int", "Float"):
        if (least := getattr(entry, "min", None)) is not None and value < least:
            return None
        if (most := getattr(entry, "max", None)) is not None and value > most:
            return None
    if kind == "Combo" and value not in entry.options:
        return None
    return value


@pytest.fixture(scope="module")
def nodes(node_module):
    """The nodes by id, and their inputs with a value. An input keeps the name of its type."""
    import comfy_api.latest as api

    classes = asyncio.run(node_module("").ContextForcingExtension().get_node_list())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_module("loaders").folder_paths, "get_filename_list", lambda kind: list(STUDENTS))
        for kind in ("Int", "Float", "String", "Boolean", "Combo"):
            make = staticmethod(lambda name, kind=kind, **options: SimpleNamespace(id=name, kind=kind, **options))
            patch.setattr(api.io, kind, type(kind, (), {"Type": object, "Input": make, "Output": make}))
        schemas = [(node, node.define_schema()) for node in classes]
    return {
        schema.node_id: (node, {each.id: each for each in schema.inputs if hasattr(each, "kind")})
        for node, schema in schemas
    }


class Model(SimpleNamespace):
    """What nodes read of a MODEL; a namespace itself has no weak references."""


class Stop(Exception):
    """The checks are over, the work would begin."""


@pytest.fixture
def wires(node_module, tmp_path, monkeypatch, net):
    """What other nodes give to each input without a value; ComfyUI's folders are in this test's folder."""
    for name in ("output", "input", "models", "outside"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "outside")
    memory = empty_memory(MemoryConfig(), (16, 4, 6))
    save_memory(tmp_path / "input" / "kept.safetensors", memory)
    (tmp_path / "outside" / "secret.safetensors").write_bytes((tmp_path / "input" / "kept.safetensors").read_bytes())
    for name, content in STUDENTS.items():
        (tmp_path / "models" / name).write_bytes(content)
    paths = node_module("output_files").folder_paths
    for kind in ("output", "input"):
        monkeypatch.setattr(paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    monkeypatch.setattr(paths, "annotated_filepath", annotated(tmp_path))
    monkeypatch.setattr(paths, "get_save_image_path", save_image_path)
    monkeypatch.setattr(paths, "get_full_path_or_raise", lambda kind, name: str(tmp_path / "models" / name))

    def stop(*_, **__):
        raise Stop

    monkeypatch.setattr(node_module("sampler"), "prepare_sampler", stop)
    monkeypatch.setattr(node_module("video"), "write_video", stop)
    monkeypatch.setattr(node_module("video"), "decode_stream", lambda *_: iter(()))
    monkeypatch.setattr(node_module("consistency"), "measure_consistency", stop)
    tree = SimpleNamespace(
        patch_embedding=SimpleNamespace(in_channels=16), img_emb=None, named_parameters=net.named_parameters,
        blocks=net.blocks,
        patch_size=net.patch_size, text_len=net.text_len,
    )  # fmt: skip
    model = Model(
        model=type("WAN21", (), {"diffusion_model": tree, "get_dtype": lambda self: torch.float32})(),
        load_device=torch.device("cpu"), backup={}, object_patches={}, wrappers={}, clone=lambda: model,
        model_options={"transformer_options": {}}, get_attachment=lambda name: CARD, set_attachments=lambda *_: None,
        get_additional_models_with_key=lambda key: [], get_model_object=lambda name: None,
    )  # fmt: skip
    film = dataclasses.replace(memory, latent_chunks=(torch.zeros(1, 16, 3, 4, 6),))
    handle = node_module("handle").MemoryHandle
    return {
        "model": model, "clip": None, "vae": None, "positive": [[torch.ones(1, 5, 64), {}]],
        "memory": handle.of(memory),
        "film": handle.of(film), "images": torch.zeros(2, 8, 8, 3),
    }  # fmt: skip


def annotated(root):
    """ComfyUI's folder_paths.annotated_filepath: a folder in brackets at the end of a name."""

    def split(name):
        for kind in ("output", "input"):
            if name.endswith(f"[{kind}]"):
                return name[: -len(kind) - 3], str(root / kind)
        return name, None

    return split


def save_image_path(prefix, root, width=0, height=0):
    """ComfyUI's folder_paths.get_save_image_path: makes the folder of a prefix."""
    folder = os.path.join(root, os.path.dirname(os.path.normpath(prefix)))
    os.makedirs(folder, exist_ok=True)
    return folder, os.path.basename(os.path.normpath(prefix)), 1, os.path.dirname(os.path.normpath(prefix)), prefix


NAMES = st.sampled_from((
    "kept.safetensors [input]", "../outside/secret.safetensors [input]", "kept.safetensors",
    "../outside/secret.safetensors",
    "/proc/self/environ", "kept.safetensors [output]", "x [temp]", "../input/kept.safetensors [output]", "a/../../x",
    "%date:yyyy%",
    "%KSampler.seed%", "%%", "%date:" + "y" * 5000 + "%", "..\\..\\x", "video/" * 2000, "x/" * 40 + "a", "a" * 300,
    "0:00 A meadow.\n0:06", BOARD, "0:00 x\n99999999", BOARD * 500, "1000,500", "1000, abc", "1e400", ",",
    "1000," * 999,
))  # fmt: skip
VALUES = (
    NAMES | st.sampled_from(TEXTS) | st.sampled_from(SCALARS) | st.text(max_size=20) | st.integers(-2, 70) | st.floats()
)


def fitting(entry):
    """Values of an input that ComfyUI lets through, its limits among them."""
    if entry.kind == "Boolean":
        return st.booleans()
    if entry.kind in ("Int", "Float"):
        numbers = st.integers if entry.kind == "Int" else st.floats
        return st.sampled_from((entry.min, entry.max)) | numbers(entry.min, entry.max)
    options = list(getattr(entry, "options", ()))
    return st.sampled_from(options) if options else NAMES | st.sampled_from(TEXTS) | st.text(max_size=20)


def files_below(root):
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@drill(100, data=st.data())
def test_inputs_of_nodes(nodes, wires, tmp_path, data):
    node_id = data.draw(st.sampled_from(sorted(name for name, (_, inputs) in nodes.items() if inputs)))
    node, inputs = nodes[node_id]
    values = {name: getattr(entry, "default", None) for name, entry in inputs.items()}
    values |= {"text": BOARD} if "text" in values else {}
    values |= {
        name: entry.options[0]
        for name, entry in inputs.items()
        if values[name] is None and getattr(entry, "options", 0)
    }
    for name in data.draw(st.lists(st.sampled_from(sorted(inputs)), min_size=1, max_size=3, unique=True)):
        given = data.draw(VALUES | fitting(inputs[name]))
        # The list of files is made from folders. Every name is tried here, to test validate_inputs.
        values[name] = given if name == "file" and isinstance(given, str) else comfyui_value(inputs[name], given)
    before = files_below(tmp_path)
    if any(value is None or (isinstance(value, float) and math.isnan(value)) for value in values.values()):
        tried["nodes, refused by ComfyUI"] += 1
        return
    checked = {name: values[name] for name in ("filename_prefix", "file") if name in values}
    if checked and (reason := used_or_refused(f"node {node_id}", lambda: node.validate_inputs(**checked))) is not True:
        assert is_line(f"{next(iter(checked))}: {reason}"), reason
        refused_ones[f"node {node_id}"] += 1
        assert files_below(tmp_path) == before
        return
    given = {name: wires[name] for name in WIRED[node_id]} | values
    given |= {"memory": wires["film"]} if node_id in ("ContextForcingSaveVideo", "ContextForcingSaveMemory") else {}
    node.hidden = SimpleNamespace(
        prompt={"1": {"class_type": "KSampler", "inputs": {"seed": "../../x"}}}, extra_pnginfo=None, unique_id="1",
        dynprompt=SimpleNamespace(get_node=lambda name: {"inputs": {"model": [], "clip": [], "memory": []}}),
    )  # fmt: skip

    def run():
        try:
            return node.execute(**given)
        except Stop:
            return True

    result = used_or_refused(f"node {node_id}", run)
    new = files_below(tmp_path) - before
    assert all(name.startswith("output" + os.sep) for name in new), new
    assert result is not None or not [name for name in new if (tmp_path / name).is_file()], new


WIRED = {
    "ContextForcingLoadStudent": (), "ContextForcingMemory": ("model",), "ContextForcingSampler": ("model",
    "positive", "memory"),
    "ContextForcingStoryboard": ("model", "clip", "memory"), "ContextForcingSaveVideo": ("memory", "vae"),
    "ContextForcingMemoryReport": ("memory", "vae"), "ContextForcingConsistency": ("images",),
    "ContextForcingLoadMemory": (),
    "ContextForcingSaveMemory": ("memory",), "ContextForcingStudentSettings": ("model",),
}  # fmt: skip


def test_every_node_with_values_is_drilled(nodes):
    assert set(WIRED) == {name for name, (_, inputs) in nodes.items() if inputs}
