"""Where memories are kept: between nodes, and in files of ComfyUI's folders."""

import contextlib
import functools
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management as mm
import folder_paths
from comfy_api.latest import io, ui

from ..memory.fields import brief
from ..memory.memory import Memory
from ..memory.snapshot import load_memory, save_memory
from ..video.report import summary
from .handle import Autosave, MemoryHandle, MemoryType
from .output_files import PREFIX_TOOLTIP, new_file, validate_prefix
from .page import Page
from .shared import CATEGORY, log, named_as

FOLDER = "context_forcing"
"""Folder of memory files under ComfyUI's output folder."""
SUFFIX = ".safetensors"
PERIOD, TICK = 300.0, 2.0
"""Seconds for which the list of a folder that did not change is kept, and those that two changes are apart at least."""


def keep_memory(memory: Memory, place: str, before: Memory) -> Memory:
    """A memory at one of PLACES; tensors that it shares with the memory `before` are not copied again."""
    if place == "compact":
        return memory.compact()
    return memory if place == "GPU" else memory.to(mm.intermediate_device(), before=before)


def write_autosave(memory: Memory, before: Autosave | None, is_finished: bool) -> Autosave | None:
    """Write a memory to a new file, compact where it supports that. A failure is logged, not raised.

    A file that is not compact has about 5 GB for a 1.3B student, so only the newest of a chain is kept: `before`, the
    file of the segment before, is deleted when the segment is finished and the new file is whole. Returns what the next
    segment has as `before`.
    """
    is_compact = memory.supports("compact")
    try:
        file = new_file(f"{FOLDER}/autosave", SUFFIX)
        save_memory(file.path, memory.compact() if is_compact else memory)
        written = Autosave.of(file.path)
    except (ValueError, OSError) as error:
        log.warning("autosave: %s", error)
        return before
    list_again()
    log.info("memory saved to %s", file.path)
    if is_compact or not is_finished:
        return before
    if before:
        try:
            if Autosave.of(before.path) == before:
                os.unlink(before.path)
                log.info("the memory before it is deleted: %s", before.path)
        except OSError as error:  # deleted by the user or a branch, or in use
            log.info("the memory before it is not deleted: %s (%s)", before.path, error.strerror)
    return written


@functools.lru_cache(4096)
def _entries(folder: str, time: float, period: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the folders in a folder, without links, and of the names in it that a memory can have.

    The `time` of the folder and the number of a `period` are there so that a folder is read again after a change.
    """
    with os.scandir(folder) as found:
        entries = list(found)
    folders = (entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    return tuple(folders), tuple(entry.path for entry in entries if entry.name.endswith(SUFFIX))


list_again = _entries.cache_clear
"""For a file that this pack writes: some file systems do not change the time of a folder (FAT in Windows)."""


def _files_under(root: str) -> Iterator[str]:
    """Paths of possible memories under a folder.

    ComfyUI asks for the list several times in every run, and 100,000 pictures may lie there. So a folder is not read
    again while its time is the same, for PERIOD seconds at most; one that changed just now may change again in the
    same tick of its clock.
    """
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            changed = os.stat(folder).st_mtime
            read = _entries if time.time() - changed > TICK else _entries.__wrapped__
            folders, files = read(folder, changed, time.monotonic() // PERIOD)
        except OSError:  # deleted in the meantime, or not readable
            continue
        waiting += folders
        yield from files


def memory_files() -> list[str]:
    """Possible memories: in `context_forcing` of the output folder, latest first, then in the input folder."""
    files = []
    for root, kind in ((folder_paths.get_output_directory(), "output"), (folder_paths.get_input_directory(), "input")):
        for path in _files_under(root):
            name = os.path.relpath(path, root)
            if kind == "input" or FOLDER in name:
                # A link may be broken, or the file deleted in the meantime.
                with contextlib.suppress(OSError):
                    if stat.S_ISREG((found := os.stat(path)).st_mode):
                        files.append((kind == "input", -found.st_mtime, f"{name} [{kind}]"))
    return [name for *_, name in sorted(files)]


class ContextForcingSaveMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ContextForcingSaveMemory", display_name="Save Memory", category=CATEGORY, is_output_node=True,
            description="Writes a memory, with the video so far, to a file in the output folder. Load Memory continues"
            " from it, later or on another machine with the same student.",
            search_aliases=["context forcing", "snapshot", "checkpoint", "resume"],
            hidden=[io.Hidden.prompt],
            inputs=[
                MemoryType.Input("memory", tooltip="The memory after any sampler."),
                io.String.Input("filename_prefix", default=f"{FOLDER}/memory", tooltip=PREFIX_TOOLTIP),
                io.Combo.Input("form", options=["exact", "compact"], default="exact",
                    tooltip="exact: the video continues bit for bit; about 5 GB for a 1.3B student. compact: latent"
                    " frames only, 0.4 MB each at 832x480; keys and values are computed again, not bit for bit."),
            ],
            outputs=[io.String.Output("file", tooltip="Path of the file, relative to the output folder.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        return validate_prefix(filename_prefix)

    @classmethod
    def execute(cls, memory: MemoryHandle, filename_prefix: str, form: str) -> io.NodeOutput:
        kept = memory.memory.compact() if form == "compact" else memory.memory
        file = new_file(filename_prefix, SUFFIX, cls.hidden.prompt)
        with named_as("output", file.path, file.relative):
            save_memory(file.path, kept)
        list_again()
        written = f"{file.relative}, {os.path.getsize(file.path) / 1e6:.1f} MB"
        if page := Page.current():
            page.show_text(written)  # ComfyUI's page shows the text of a result on Preview as Text only
        return io.NodeOutput(file.relative, ui=ui.PreviewText(written))


MISSING = "{} does not exist; select a file that Save Memory wrote (key R refreshes the list)"


def file_of(name: str) -> str | None:
    """The path of a file of ComfyUI's input or output folder; None if there is none, or outside of the folder.

    ComfyUI 0.27 does not look whether a name leads out of the folder.
    """
    name, folder = folder_paths.annotated_filepath(name)
    folder = Path(folder or folder_paths.get_input_directory()).absolute()
    path = os.path.abspath(folder / name)
    return path if Path(path).is_relative_to(folder) and os.path.isfile(path) else None


class ContextForcingLoadMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        file = "A file in context_forcing of the output folder, or any file in the input folder."
        return io.Schema(
            node_id="ContextForcingLoadMemory", display_name="Load Memory", category=CATEGORY,
            description="Reads a memory that Save Memory, a sampler's autosave or `context-forcing generate"
            " --memory-out` wrote. It continues with the student that it was made with.",
            search_aliases=["context forcing", "snapshot", "resume"],
            inputs=[io.Combo.Input("file", options=memory_files(), tooltip=file)],
            outputs=[
                MemoryType.Output("memory", tooltip="For a sampler, a report or Save Long Video."),
                io.String.Output("text", tooltip="What the memory holds."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file: str) -> tuple[float, int] | None:
        path = file_of(file)
        return (os.path.getmtime(path), os.path.getsize(path)) if path else None

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        """Here and not in `execute`, so that the rest of a graph runs, which may write the file."""
        # ComfyUI puts the name of the input before the reason.
        return True if file_of(file) else MISSING.format(brief(file))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = file_of(file)
        if path is None:
            raise ValueError(f"file: {MISSING.format(brief(file))}")
        with named_as("file", path, file):
            memory = load_memory(path)
        return io.NodeOutput(MemoryHandle.of(memory), summary(memory, 16.0))
