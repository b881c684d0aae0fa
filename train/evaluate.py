"""Recall over gaps on the demo world: what the camera left and comes back to (demo_world.md 4).

Every figure of consistency stands beside one of motion: a picture that never moves remembers everything.
"""

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ..memory.memory import Memory
from ..model.pipeline import Pipeline, pick_device
from ..model.story import Scene as Segment
from ..model.story import Story
from ..model.video import to_uint8
from .world import (
    ALL_STYLES, LANDMARK_COLUMNS, LANDMARK_TOP, NUM_CLASSES, RING_COLUMNS, STATION_COLUMNS, TOKEN, VIEW_COLUMNS,
    Script, Style, background, benchmark_script, caption, templates, upscale,
)  # fmt: skip

KINDS = ("dwell", "wander")
NO_SLOW = "none"
BOOTSTRAP = 2000


@dataclass(frozen=True)
class Trial:
    """One rollout, judged."""

    remembered: tuple[int, ...]
    """Class of every target at its last full view before the camera left."""
    returned: tuple[int, ...]
    """Class at the same place on return."""
    psnr: float
    """Of the targets on return against before, in latent units."""
    heading_accuracy: float
    """Share of latent frames that look where the prompts say, counted from where the film begins."""
    motion: float
    """Mean change between latent frames, over that of the true world."""
    residual: float
    """Distance of the returned landmarks to their nearest template: sharpness, smaller is better."""


@dataclass(frozen=True)
class Cell:
    """Trials of one policy, script and gap, summed up; intervals are 95 % bootstrap over rollouts."""

    policy: str
    kind: str
    gap_frames: int
    recall: float
    low: float
    high: float
    chance: float
    """Match rate of targets with those of other rollouts: what a collapsed model would score."""
    n: int
    psnr: float
    heading_accuracy: float
    motion: float
    residual: float


class World:
    """The true world in latents, to judge generated latents by."""

    def __init__(self, pipeline: Pipeline):
        self.codec = pipeline.codec
        self.device = pipeline.device

    def encode(self, art_uint8: np.ndarray) -> Tensor:
        """Art pixels [..., H, W, 3] -> latents [N, C, h, w]."""
        art = torch.from_numpy(np.array(art_uint8)).to(self.device).float() / 127.5 - 1
        return self.codec.encode_art(art.flatten(0, -4)[None])[0].movedim(1, 0)

    def landmark(self, frame_CHW: Tensor, view_column: int) -> Tensor:
        """The 2 x 2 tokens of a landmark."""
        per_token = frame_CHW.shape[-1] // VIEW_COLUMNS
        top = LANDMARK_TOP // TOKEN * per_token
        size = LANDMARK_COLUMNS * per_token
        return frame_CHW[:, top : top + size, view_column * per_token : view_column * per_token + size]

    def classify(self, frame_CHW: Tensor, view_column: int, style: Style, station: int) -> tuple[int, float]:
        """Nearest template and the distance to it."""
        crop = self.landmark(frame_CHW, view_column)
        distance = (self.encode(templates(style, station)) - crop).square().mean((1, 2, 3))
        return int(distance.argmin()), float(distance.min())

    def headings(self, film_CTHW: Tensor, style: Style) -> np.ndarray:
        """Where each frame looks, judged by sky and ground alone (token rows that no landmark covers)."""
        ring = np.clip(np.round(background(style)), 0, 255).astype(np.uint8)
        columns = (np.arange(RING_COLUMNS)[:, None] * TOKEN + np.arange(VIEW_COLUMNS * TOKEN)) % ring.shape[1]
        views = self.encode(ring[:, columns].transpose(1, 0, 2, 3))
        per_token = views.shape[-1] // VIEW_COLUMNS
        rows = [*range(per_token), *range(views.shape[-2] - per_token, views.shape[-2])]
        distance = torch.cdist(film_CTHW.movedim(1, 0)[:, :, rows].flatten(1), views[:, :, rows].flatten(1))
        return distance.argmin(1).cpu().numpy()


def story_of(script: Script, style: Style, seconds_a_chunk: float) -> Story:
    """A benchmark script as a story."""
    runs = [(move, len(list(group))) for move, group in itertools.groupby(script.moves)]
    return Story(
        segments=tuple(Segment(prompt=caption(style, move), seconds=count * seconds_a_chunk) for move, count in runs)
    )


def run_trial(
    pipeline: Pipeline, world: World, script: Script, style: Style, seed: int, settings: dict
) -> tuple[Trial, Memory]:
    """Roll one script out and judge it."""
    memory = pipeline.empty_memory(**settings)
    story = story_of(script, style, 4 * memory.config.chunk / pipeline.card.fps).with_seed(seed)
    for memory in pipeline.tell(story, memory):
        pass
    return judge(world, torch.cat(memory.film, dim=2)[0].to(world.device), script, style), memory


def judge(world: World, film: Tensor, script: Script, style: Style) -> Trial:
    """A film [C, T, H, W] held against what its script asked for."""
    seen = world.headings(film, style)
    asked = np.array(script.headings)
    # A film begins anywhere on the ring; what counts is that it comes back to where it was.
    lead = slice(0, script.target_frame + 1)
    start = np.bincount((seen[lead] - asked[lead]) % RING_COLUMNS).argmax()
    before, after = film[:, script.target_frame], film[:, script.return_frame + 1]
    remembered, returned, errors, residuals = [], [], [], []
    for station in range(RING_COLUMNS // STATION_COLUMNS):
        column = (station * STATION_COLUMNS - script.target_heading - start) % RING_COLUMNS
        if column > VIEW_COLUMNS - LANDMARK_COLUMNS:
            continue
        remembered.append(world.classify(before, column, style, station)[0])
        class_id, residual = world.classify(after, column, style, station)
        returned.append(class_id)
        residuals.append(residual)
        errors.append((world.landmark(before, column) - world.landmark(after, column)).square().mean())
    truth_moves = np.abs(np.diff(script.headings)).mean()
    seen_moves = np.abs((np.diff(seen) + RING_COLUMNS // 2) % RING_COLUMNS - RING_COLUMNS // 2).mean()
    return Trial(
        remembered=tuple(remembered),
        returned=tuple(returned),
        psnr=float(-10 * torch.log10(torch.stack(errors).mean() + 1e-12)),
        heading_accuracy=float((seen == (asked + start) % RING_COLUMNS).mean()),
        motion=float(seen_moves / truth_moves),
        residual=float(np.mean(residuals)),
    )


def sum_up(policy: str, kind: str, gap_frames: int, trials: list[Trial]) -> Cell:
    """Recall with its interval and its chance level."""
    hits = np.array([np.mean([a == b for a, b in zip(t.remembered, t.returned)]) for t in trials])
    draws = np.random.default_rng(0).integers(len(trials), size=(BOOTSTRAP, len(trials)))
    low, high = np.percentile(hits[draws].mean(1), [2.5, 97.5])
    others = [a == b for one, two in itertools.permutations(trials, 2) for a, b in zip(one.remembered, two.returned)]
    mean = lambda name: float(np.mean([getattr(t, name) for t in trials]))
    return Cell(
        policy, kind, gap_frames, float(hits.mean()), float(low), float(high), float(np.mean(others)), len(trials),
        mean("psnr"), mean("heading_accuracy"), mean("motion"), mean("residual"),
    )  # fmt: skip


def evaluate_recall(
    student: str | None,
    policies: list[str],
    gap_chunks: list[int],
    rollouts: int,
    seed: int,
    device: str,
    dtype: str,
    out: Path,
) -> Table:
    """Recall at every gap under every policy; writes recall.json and one filmstrip a cell into `out`."""
    pipeline = Pipeline.load(student, *pick_device(device, dtype))
    world = World(pipeline)
    out.mkdir(parents=True, exist_ok=True)
    policies = [policy.strip() for policy in policies]
    settings_of = {policy: {"slow": 0} if policy == NO_SLOW else {"policy": policy} for policy in policies}
    for settings in settings_of.values():
        pipeline.empty_memory(**settings)
    jobs = list(itertools.product(KINDS, gap_chunks, policies))
    cells = []
    for kind, gap, policy in track(jobs, description="evaluate", transient=True):
        trials, gap_frames = [], 0
        for k in range(rollouts):
            script = benchmark_script(kind, gap, mirror=k % 2 == 1)
            style = ALL_STYLES[np.random.default_rng((seed, k)).integers(len(ALL_STYLES))]
            trial, memory = run_trial(pipeline, world, script, style, seed * 10_000 + k, settings_of[policy])
            gap_frames = len(script.hidden_frames)
            trials.append(trial)
            if k == 0:
                strip(pipeline, memory).save(out / f"{kind}-{gap_frames}-{policy}.png")
        cells.append(sum_up(policy, kind, gap_frames, trials))
        (out / "recall.json").write_text(json.dumps([asdict(cell) for cell in cells], indent=1))
    return as_table(cells)


def as_table(cells: list[Cell]) -> Table:
    """Recall beside motion, for a person."""
    table = Table(title=f"recall@gap (chance of a blind guess 1/{NUM_CLASSES})")
    for column in ("script", "gap, latent frames", "policy", "recall [95 %]", "shuffled", "PSNR", "heading", "motion",
                   "residual", "n"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("script", "policy") else "right")
    for c in cells:
        table.add_row(
            c.kind, str(c.gap_frames), c.policy, f"{c.recall:.2f} [{c.low:.2f}, {c.high:.2f}]", f"{c.chance:.2f}",
            f"{c.psnr:.1f}", f"{c.heading_accuracy:.2f}", f"{c.motion:.2f}", f"{c.residual:.3f}", str(c.n),
        )  # fmt: skip
    return table


def strip(pipeline: Pipeline, memory: Memory, columns: int = 12, scale: int = 3) -> Image.Image:
    """The film as a strip of pictures, evenly spread."""
    film = torch.cat(memory.film, dim=2)
    picked = np.linspace(0, film.shape[2] - 1, 4 * columns).round().astype(int)
    pixels = torch.cat(list(pipeline.decode([film])), dim=2)
    frames = upscale(to_uint8(pixels)[4 * picked], scale)
    rows = [np.concatenate(list(frames[i : i + columns]), axis=1) for i in range(0, len(frames), columns)]
    return Image.fromarray(np.concatenate(rows, axis=0)).resize(
        (1920, rows[0].shape[0] * len(rows) * 1920 // rows[0].shape[1])
    )
