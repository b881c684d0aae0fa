"""What the page asks the server: the segments of a storyboard, or its wrong lines."""

from collections.abc import Mapping
from typing import Any

from aiohttp import web
from server import PromptServer

from ..memory.fields import json_object, quoted
from ..memory.memory import CHANGES
from ..model.checkpoints.published import PUBLISHED
from ..model.config import StudentCard
from ..model.units import latent_seconds
from ..video.storyboard import chunk_story, parse_storyboard, wrong_lines

PATH = "/context_forcing/storyboard"


def outline(request: Mapping[str, Any]) -> dict[str, Any]:
    """The segments of `text`, in whole chunks, or what is wrong with it.

    The student is told by `card`, the name of a published one, or by `fps` and `chunk`, which come first; a missing or
    unknown value is that of Self-Forcing's family. Raises ValueError if a value has another type.
    """
    text, fps, chunk = request.get("text"), request.get("fps"), request.get("chunk")
    if not isinstance(text, str):
        raise ValueError("text: it is not a text; send the storyboard")
    for name, value, types, kind in (("fps", fps, (int, float), "number"), ("chunk", chunk, int, "whole number")):
        if value is not None and (isinstance(value, bool) or not isinstance(value, types) or not 0 < value < 1e4):
            raise ValueError(f"{name}: {quoted(value)} is not a {kind} above 0 and below 10000")
    known = PUBLISHED.get(str(request.get("card")))
    card = known.card if known else StudentCard()
    fps, chunk = fps or card.fps, chunk or card.memory.chunk
    chunk_seconds = latent_seconds(chunk, fps)
    try:
        storyboard = parse_storyboard(text)
        segments = chunk_story(storyboard, fps, chunk).segments
    except ValueError as error:
        reasons = wrong_lines(text, fps, chunk)
        return {"error": str(error), "reasons": {str(number): reason for number, reason in reasons.items()}}
    return {
        "chunk_seconds": chunk_seconds,
        "changes": list(CHANGES),
        "segments": [
            {
                "line": line.number, "chunks": round(segment.seconds / chunk_seconds), "prompt": segment.prompt,
                "change": segment.change, "blend": segment.blend, "seed": segment.seed,
            }
            for line, segment in zip(storyboard.lines, segments)
        ],
        "end_line": storyboard.end_line,
    }  # fmt: skip


async def answer(request: web.Request) -> web.Response:
    """`outline` as JSON; status 400 for a request that is not understood."""
    try:
        return web.json_response(outline(json_object((await request.read()).decode(), "storyboard")))
    except ValueError as error:  # also what is not UTF-8
        return web.json_response({"error": str(error)}, status=400)


def add_routes() -> None:
    """Register the route with ComfyUI's server."""
    PromptServer.instance.routes.post(PATH)(answer)
