"""New files under ComfyUI's output folder, named by a prefix with tokens as in ComfyUI's own save nodes."""

import os
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import folder_paths
from comfy_api.latest import io, ui

from ..memory.fields import quoted

TOKEN = re.compile(r"%([^%]+)%")
FORBIDDEN = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')
"""Characters of an input's value that a file name does not keep."""
DATE_PART = re.compile("yyyy|yy|M{1,2}|d{1,2}|h{1,2}|m{1,2}|s{1,2}")
DATE_FIELDS = {"M": "tm_mon", "d": "tm_mday", "h": "tm_hour", "m": "tm_min", "s": "tm_sec"}
PREFIX_TOOLTIP = (
    "File name, with folders under ComfyUI's output folder. Tokens: %date:yyyy-MM-dd%, %year%, %width%, or"
    " %Node.input% for the value of another node's input."
)

MAX_NAME = 200
"""Bytes of a folder or name in a prefix. File systems take 255; the number and the endings of a file need some."""
MAX_PREFIX = 1000

Prompt = Mapping[str, Mapping[str, Any]]
"""The nodes of a prompt by their ids (io.Hidden.prompt)."""


class OutputFile(NamedTuple):
    """A file that does not exist yet; its folder does."""

    path: str
    name: str
    subfolder: str

    @property
    def shown(self) -> ui.SavedResult:
        """What a node returns to show the file."""
        return ui.SavedResult(self.name, self.subfolder, io.FolderType.output)

    @property
    def relative(self) -> str:
        """The path under the output folder."""
        return os.path.join(self.subfolder, self.name)


def new_file(prefix: str, suffix: str, prompt: Prompt | None = None, size: tuple[int, int] = (0, 0)) -> OutputFile:
    """A new file of a prefix with tokens; `size` is that of %width% and %height%. Raises ValueError, one line."""
    prefix = check_prefix(prefix, prompt)
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), *size
        )
    except OSError as error:
        raise ValueError(
            f"filename_prefix: {quoted(prefix)} cannot be written ({error.strerror}); give another"
        ) from None
    file = f"{name}_{counter:05}_{suffix}"
    return OutputFile(os.path.join(folder, file), file, subfolder)


def check_prefix(prefix: str, prompt: Prompt | None = None) -> str:
    """The prefix with its tokens replaced. Raises ValueError if it is too long or no name under the output folder."""
    replaced = replace_tokens(prefix, prompt or {})
    names = replaced.replace(os.sep, "/").split("/")
    if len(replaced) > MAX_PREFIX or max(len(name.encode(errors="replace")) for name in names) > MAX_NAME:
        raise ValueError(
            f"filename_prefix: {quoted(prefix)} is too long; give at most {MAX_PREFIX} characters, a name {MAX_NAME}"
        )
    # Links are followed, as ComfyUI does.
    root = os.path.realpath(folder_paths.get_output_directory())
    path = os.path.realpath(os.path.join(root, replaced))
    if not path.startswith(os.path.join(root, "")):
        raise ValueError(
            f"filename_prefix: {quoted(prefix)} is not a file under the output folder; give a name such as video/film"
        )
    return replaced


def validate_prefix(prefix: str | None) -> bool | str:
    """For validate_inputs, before any node runs: True or the reason of a refusal. A connected prefix is None."""
    try:
        return prefix is None or bool(check_prefix(prefix))
    except ValueError as error:
        # ComfyUI puts the name of the input before the reason.
        return str(error).removeprefix("filename_prefix: ")


def replace_tokens(prefix: str, prompt: Prompt) -> str:
    """Replace %date:FORMAT% and %Node.input%; ComfyUI replaces %width%, %year% and the like itself.

    `Node` is the title or the type of a node of the prompt; of several, the first. An unknown token stays.
    """

    def value(token: re.Match) -> str:
        text = token[1]
        if text.startswith("date:"):
            return FORBIDDEN.sub("_", format_date(text.removeprefix("date:"), time.localtime()))
        title, _, name = text.rpartition(".")
        for node in prompt.values():
            names = node.get("_meta", {}).get("title"), node.get("class_type")
            if title and title in names and not isinstance(given := node["inputs"].get(name, []), list):
                return FORBIDDEN.sub("_", str(given))
        return token[0]

    return TOKEN.sub(value, prefix)


def format_date(form: str, moment: time.struct_time) -> str:
    """A time in the form of ComfyUI's page, yyyy-MM-dd hh:mm:ss; a single letter has no leading zero."""

    def part(match: re.Match) -> str:
        letters = match[0]
        if letters[0] == "y":
            return f"{moment.tm_year:04}"[-len(letters) :]
        return f"{getattr(moment, DATE_FIELDS[letters[0]]):0{len(letters)}}"

    return DATE_PART.sub(part, form)
