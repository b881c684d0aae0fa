"""Makes the pictures of templates and help pages: films that the tutorials make in ComfyUI, as animated WebP.

python scripts/template_pictures.py        (needs a ComfyUI as the tests do, and Pillow with WebP)

ComfyUI's page asks for NAME.jpg and nothing else; browsers find out by its content that a picture is a WebP.
"""

import importlib.util
import io
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from context_forcing.model.checkpoints.student import DEMO_STUDENT, StudentSource
from context_forcing.video.consistency import draw_consistency, measure_consistency, palette

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / "workflows"
HELP = ROOT / "web" / "docs" / "pictures"
SIDE, FPS, SHOWN_FPS, MOST = 288, 16, 8, 48
"""Pixels of a picture's side; frames per second of the films and the pictures; frames that a picture has at most."""
INK, PAPER = (236, 236, 232), (24, 26, 32)
COLOURS = ((86, 156, 214), (220, 160, 60), (110, 180, 110), (190, 110, 190))


@dataclass(frozen=True)
class Tutorial:
    """A tutorial, as its picture shows it."""

    begin: str
    """How its name begins."""
    bounds: tuple[float, ...]
    """Seconds at which segments begin."""
    captions: tuple[str, ...] = ("",)
    """One for each of its last videos."""


TUTORIALS = (
    Tutorial("Tutorial 1", (0, 3, 6)),
    Tutorial("Tutorial 2", (0, 3, 6, 9, 12, 15, 18)),
    Tutorial("Tutorial 3", (0, 3), ("A", "B", "C")),
    Tutorial("Tutorial 4", (0, 3)),
    Tutorial("Tutorial 5", (0, 3)),
    Tutorial("Tutorial 6", (0,)),
    Tutorial("Tutorial 7", (0, 3)),
)
STAND_IN = {
    "Long video (Self-Forcing)": ("Tutorial 2", "Self-Forcing 1.3B"),
    "Long video (LongLive)": ("Tutorial 2", "LongLive 1.3B"),
    "Long video (Context Forcing)": ("Tutorial 2", "Context Forcing 1.3B"),
    "Long video (low memory)": ("Tutorial 1", "keys and values in RAM"),
    "Long video (LoRA and fp8)": ("Tutorial 1", "your LoRA, fp8 weights"),
    "Long video from a picture": ("Tutorial 4", "your picture comes first"),
    "Long video with a reference": ("Tutorial 4", "your picture is remembered"),
}
"""Templates of students whose weights were never run here: the tutorial whose film stands in, and a heading."""
HELP_FILMS = {"Tutorial 1": "film", "Tutorial 2": "storyboard", "Tutorial 4": "start", "Tutorial 7": "saved"}
HELP_SCALE, HELP_MOST = 2, 24
"""Enlargement of the films on help pages, and their frames."""


def frames_of(path: Path) -> np.ndarray:
    """Frames [T, H, W, 3] of a video, at the size of the demo student."""
    width, height = StudentSource(DEMO_STUDENT).open().card.size
    reader = imageio_ffmpeg.read_frames(str(path))
    full_width, full_height = next(reader)["size"]
    scale = full_width // width
    frames = np.stack([np.frombuffer(frame, np.uint8).reshape(full_height, full_width, 3) for frame in reader])
    return frames[:, scale // 2 :: scale, scale // 2 :: scale][:, :height, :width]


def pictures_of(
    films: Sequence[np.ndarray], tutorial: Tutorial, heading: str = "", footer: str = ""
) -> list[Image.Image]:
    """Pictures of the films, one below the other, over a time line with a piece for each segment."""
    length, font = max(map(len, films)), ImageFont.load_default(16)
    height, width = films[0].shape[1:3]
    scale = min(SIDE / width, (SIDE - 60) / (height * len(films)) - 0.03)
    size, bar = (round(width * scale), round(height * scale)), SIDE - 34
    left, top = (SIDE - size[0]) // 2, max(4, (bar - 8 - size[1] * len(films)) // 2)
    place = lambda second: 8 + round((SIDE - 16) * second * FPS / length)
    pictures = []
    for moment in range(0, length, max(FPS // SHOWN_FPS, -(-length // MOST))):
        picture = Image.new("RGB", (SIDE, SIDE), PAPER)
        draw = ImageDraw.Draw(picture)
        for row, (film, caption) in enumerate(zip(films, tutorial.captions)):
            frame = Image.fromarray(film[min(moment, len(film) - 1)]).resize(size, Image.Resampling.NEAREST)
            picture.paste(frame, (left, top + row * (size[1] + 3)))
            draw.text((left + 6, top + 4 + row * (size[1] + 3)), caption, INK, font, stroke_width=2, stroke_fill=PAPER)
        for number, (begin, end) in enumerate(zip(tutorial.bounds, [*tutorial.bounds[1:], length / FPS])):
            draw.rectangle((place(begin), bar, place(end) - 2, bar + 8), COLOURS[number % len(COLOURS)])
        now = place(moment / FPS)
        draw.rectangle((now - 1, bar - 4, now + 1, bar + 12), INK)
        draw.text((SIDE // 2, bar - 44), heading, INK, font, anchor="mm")
        draw.text((SIDE // 2, bar - 22), footer, INK, font, anchor="mm")
        pictures.append(picture)
    return pictures


def write(path: Path, pictures: list[Image.Image]) -> None:
    with open(path, "wb") as file:
        pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:], duration=1000 // SHOWN_FPS, loop=0,
            quality=45, method=2)  # fmt: skip
    print(f"{path.name}: {len(pictures)} frames, {path.stat().st_size / 1000:.0f} kB")


def help_film(film: np.ndarray) -> list[Image.Image]:
    size = (film.shape[2] * HELP_SCALE, film.shape[1] * HELP_SCALE)
    frames = film[:: -(-len(film) // HELP_MOST)]
    return [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in frames]


def student_card() -> Image.Image:
    """What Load Student and Student Settings give: the settings on the card of a student."""
    card, font = StudentSource(DEMO_STUDENT).open().card, ImageFont.load_default(15)
    memory = card.memory
    lines = [
        ("steps", ", ".join(f"{step:g}" for step in card.steps)), ("shift", f"{card.shift:g}"),
        ("solver", card.solver), ("fps", str(card.fps)), ("chunk", f"{memory.chunk} latent frames"),
        ("memory", f"sink {memory.sink} + slow {memory.slow} + fast {memory.fast}, policy {memory.policy}"),
    ]  # fmt: skip
    picture = Image.new("RGB", (420, 24 * len(lines) + 44), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((14, 10), "Card of the demo student", COLOURS[1], font)
    for number, (name, value) in enumerate(lines):
        draw.text((14, 38 + 24 * number), name, COLOURS[0], font)
        draw.text((100, 38 + 24 * number), value, INK, font)
    return picture


def reference_slots() -> Image.Image:
    """Where a reference is: in the first slot of a memory."""
    memory, font = StudentSource(DEMO_STUDENT).open().card.memory, ImageFont.load_default(15)
    parts = (("reference", 1), ("sink", memory.sink - 1), ("slow", memory.slow), ("fast", memory.fast))
    picture = Image.new("RGB", (24 * sum(count for _, count in parts) + 28, 84), PAPER)
    draw, left = ImageDraw.Draw(picture), 14
    for (name, count), colour in zip(parts, reversed(COLOURS)):
        place = left if name != "reference" else 14
        draw.text((place, 54 if name != "reference" else 10), name, colour, font)
        for slot in range(count):
            draw.rectangle((left + 24 * slot, 32, left + 24 * slot + 20, 50), colour)
        left += 24 * count
    return picture


def write_help(films: Mapping[str, Sequence[np.ndarray]], report: Image.Image) -> None:
    """The pictures of help pages."""
    HELP.mkdir(exist_ok=True)
    for begin, name in HELP_FILMS.items():
        write(HELP / f"{name}.webp", help_film(films[begin][0]))
    write(HELP / "report.webp", [report.resize((report.width // 2, report.height // 2))])
    curve = measure_consistency(iter(films["Tutorial 2"][0]), float(FPS), {"palette": palette}, 1.0)
    plot = draw_consistency({"video": curve})
    write(HELP / "consistency.webp", [plot.resize((plot.width // 2, plot.height // 2))])
    reference_slots().quantize(16).save(HELP / "reference.png", optimize=True)
    student_card().quantize(16).save(HELP / "card.png", optimize=True)


def main() -> None:
    spec = importlib.util.spec_from_file_location("host", ROOT / "tests" / "nodes" / "host.py")
    assert spec and spec.loader
    server = sys.modules["host"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    comfyui = server.find_comfyui()
    if isinstance(comfyui, str):
        sys.exit(comfyui)
    films, report = {}, Image.new("RGB", (2, 2))
    with tempfile.TemporaryDirectory() as base:
        host = server.Host(comfyui, Path(base))
        host.start()
        try:
            for tutorial in TUTORIALS:
                prompt = server.to_api(server.template(tutorial.begin), host.get("/object_info"))
                run = host.run(prompt)
                saves = [node for node, entry in prompt.items() if entry["class_type"] == "ContextForcingSaveVideo"]
                saves = sorted(saves, key=int)[-len(tutorial.captions) :]
                for shown in (node for node, e in prompt.items() if e["class_type"] == "ContextForcingMemoryReport"):
                    report = Image.open(io.BytesIO(host.view(run.outputs[shown]["images"][0]))).convert("RGB")
                films[tutorial.begin] = [frames_of(host.output_path(run.outputs[save]["images"][0])) for save in saves]
        finally:
            host.stop()
    write_help(films, report)
    for tutorial in TUTORIALS:
        (path,) = WORKFLOWS.glob(f"{tutorial.begin}*.json")
        write(path.with_suffix(".jpg"), pictures_of(films[tutorial.begin], tutorial))
        for name, (begin, heading) in STAND_IN.items():
            if begin == tutorial.begin:
                pictures = pictures_of(films[begin], tutorial, heading, "shown: film of the demo student")
                write(WORKFLOWS / f"{name}.jpg", pictures)


if __name__ == "__main__":
    main()
