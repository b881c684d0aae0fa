"""The demo world: a ring of landmarks under a panning camera, where forgetting can be seen and counted."""

from .background import background
from .camera import frame_moves, headings, render_latent_frames, render_pixel_frames, upscale, view
from .geometry import (
    ART_SCALE, FRAMES_PER_LATENT, LANDMARK, LANDMARK_COLUMNS, LANDMARK_TOP, NUM_STATIONS, RING_COLUMNS, RING_WIDTH,
    STATION_COLUMNS, TOKEN, VIEW_COLUMNS, VIEW_HEIGHT, VIEW_WIDTH,
)
from .prompts import (
    ALL_STYLES, GROUNDS, TIMES, WEATHERS, Style, caption, parse_prompt,
)
from .scene import Scene, VisibleLandmark, landmarks_in_view, panorama, template, templates
from .scripts import CHUNK, Script, benchmark_script, pacing_script, random_script, random_style, random_styles
from .sprites import COLOURS, NUM_CLASSES, NUM_COLOURS, NUM_SHAPES, SHAPES

__all__ = [
    "ALL_STYLES", "ART_SCALE", "CHUNK", "COLOURS", "FRAMES_PER_LATENT", "GROUNDS", "LANDMARK", "LANDMARK_COLUMNS",
    "LANDMARK_TOP", "NUM_CLASSES", "NUM_COLOURS", "NUM_SHAPES", "NUM_STATIONS", "RING_COLUMNS", "RING_WIDTH",
    "SHAPES", "STATION_COLUMNS", "Scene", "Script", "Style", "TIMES", "TOKEN", "VIEW_COLUMNS", "VIEW_HEIGHT",
    "VIEW_WIDTH", "VisibleLandmark", "WEATHERS", "background", "benchmark_script",
    "caption", "frame_moves", "headings", "landmarks_in_view", "pacing_script", "panorama", "parse_prompt", "random_script",
    "random_style", "random_styles", "render_latent_frames", "render_pixel_frames", "template", "templates",
    "upscale", "view",
]
