"""Memories at rest: in RAM, on the GPU, compact; in files of the output folder."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import comfy.model_management as mm
import folder_paths
from comfy_api.latest import io, ui

from ..memory.memory import Memory
from ..memory.snapshot import load_memory, save_memory
from ..video.report import summary
from .handle import CATEGORY, MemoryHandle, MemoryType, log

PLACES = ("RAM", "GPU", "compact")
FOLDER = "context_forcing"
FORMS = ("exact", "compact")


def at_rest(memory: Memory, place: str, before: Memory) -> Memory:
    """A memory as it waits for the next node; what it shares with the one `before` it is not copied."""
    if place == "compact":
        return memory.compact()
    return memory if place == "GPU" else memory.to(mm.intermediate_device(), before=before)


def new_file(prefix: str) -> str:
    """A file that does not exist yet, under ComfyUI's output folder. Raises ValueError for one outside."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    return os.path.join(folder, f"{name}_{counter:05}_.safetensors")


@dataclass
class Kept:
    """What there is to save."""

    memory: Memory | None = None


@contextlib.contextmanager
def autosaved(wanted: bool) -> Iterator[Kept]:
    """Save what is there at the end, also after an interrupt or an error. Compact, where keys can be made anew."""
    kept = Kept()
    try:
        yield kept
    finally:
        if wanted and kept.memory is not None:
            try:
                path = new_file(f"{FOLDER}/autosave")
                save_memory(path, kept.memory.compact() if kept.memory.supports("compact") else kept.memory)
                log.info("memory saved to %s", path)
            except (ValueError, OSError) as error:
                # The segment itself is whole, or its own error is the one to be told.
                log.warning("autosave: %s", error)


class ContextForcingSaveMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ContextForcingSaveMemory",
            display_name="Save Memory",
            category=CATEGORY,
            description="Writes a memory, with the whole video so far, to a file in the output folder. Load Memory goes"
            " on from it tomorrow, or on another machine with the same student.",
            search_aliases=["context forcing", "snapshot", "checkpoint", "resume"],
            is_output_node=True,
            inputs=[
                MemoryType.Input("memory", tooltip="The end of any sampler."),
                io.String.Input(
                    "filename_prefix", default=f"{FOLDER}/memory",
                    tooltip="Name of the file, with folders under ComfyUI's output folder.",
                ),
                io.Combo.Input(
                    "form", options=list(FORMS), default="exact",
                    tooltip="exact: going on gives the same video to the bit; for a 1.3B student about 5 GB. compact:"
                    " frames only, 0.4 MB each at 832x480; keys are made anew on the way, close but not the same.",
                ),
            ],
            outputs=[io.String.Output("file", tooltip="Where it was written, relative to the output folder.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, memory, filename_prefix, form) -> io.NodeOutput:
        path = new_file(filename_prefix)
        save_memory(path, memory.memory.compact() if form == "compact" else memory.memory)
        name = os.path.relpath(path, folder_paths.get_output_directory())
        said = f"{name}, {os.path.getsize(path) / 1e6:.1f} MB"
        return io.NodeOutput(name, ui=ui.PreviewText(said))


def saved_memories() -> list[str]:
    """Files under the output and input folders that may be memories; the latest of the output folder first."""
    found = []
    for root, kind in ((folder_paths.get_output_directory(), "output"), (folder_paths.get_input_directory(), "input")):
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                wanted = name.endswith(".safetensors") and (kind == "input" or FOLDER in os.path.relpath(path, root))
                # A link may lead nowhere, a file be deleted meanwhile.
                if wanted and os.path.isfile(path):
                    found.append((kind == "input", -os.path.getmtime(path), f"{os.path.relpath(path, root)} [{kind}]"))
    return [name for *_, name in sorted(found)]


class ContextForcingLoadMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ContextForcingLoadMemory",
            display_name="Load Memory",
            category=CATEGORY,
            description="Reads a memory that Save Memory, a sampler's autosave or `context-forcing generate"
            " --memory-out` wrote. Samplers refuse it if another student made it.",
            search_aliases=["context forcing", "snapshot", "resume"],
            inputs=[
                io.Combo.Input(
                    "file", options=saved_memories(),
                    tooltip="A memory in the output folder's context_forcing, or any in the input folder.",
                ),
            ],
            outputs=[
                MemoryType.Output("memory", tooltip="Goes into a sampler, a report or Save Long Video."),
                io.String.Output("text", tooltip="What it holds, in words."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file):
        path = folder_paths.get_annotated_filepath(file)
        return (os.path.getmtime(path), os.path.getsize(path)) if os.path.isfile(path) else None

    @classmethod
    def validate_inputs(cls, file):
        return True if folder_paths.exists_annotated_filepath(file) else f"file: {file} does not exist"

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        memory = load_memory(folder_paths.get_annotated_filepath(file))
        return io.NodeOutput(MemoryHandle.of(memory), summary(memory, 16.0))
