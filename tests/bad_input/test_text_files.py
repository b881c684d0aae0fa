"""Stories, storyboards, training settings, prompt lists, cards and the tags of videos, written by a stranger."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.memory.fields import one_line
from context_forcing.model.config import StudentCard
from context_forcing.train import plan_stage
from context_forcing.train.data.manifest import read_manifest
from context_forcing.train.data.sources import list_sources
from context_forcing.train.presets import CONFIGS
from context_forcing.video import provenance
from context_forcing.video.batch import Batch
from context_forcing.video.jobs import read_jobs
from context_forcing.video.storyboard import read_story, write_storyboard, wrong_lines

from .drill import TEXTS, as_json, damaged, drill, mutated, scalars, texts, used_or_refused, values

STORY = {
    "size": [48, 32], "fps": 16, "seed": 4, "commit_attends": "all",
    "segments": [
        {"prompt": "a meadow by day", "seconds": 3},
        {"prompt": "a desert", "seconds": 1.5, "seed": 9, "change": "recache", "blend": 2},
    ],
    "references": ["fox.png", {"image": "place.png", "prompt": "a meadow"}],
}  # fmt: skip
CARD = StudentCard(base="demo", size=(48, 32))
MEMORY = empty_memory(MemoryConfig(), (16, 4, 6))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path):
    """A story as `generate` reads it, for a student and a memory."""
    story = read_story(path, CARD.fps, CARD.memory.chunk)
    assert story.resolve(CARD, MEMORY).num_chunks > 0
    return story


@st.composite
def yaml_texts(draw, tree):
    """YAML of a mutated tree, in block or flow style, or as JSON; sometimes with damaged characters."""
    changed = draw(mutated(tree))
    try:
        text = draw(st.sampled_from((yaml.safe_dump, json.dumps)))(changed)
    except yaml.YAMLError:
        text = as_json(changed)
    if draw(st.booleans()):
        return text.encode(errors="surrogatepass")
    return draw(damaged(text.encode(errors="surrogatepass")))


@drill(24, text=yaml_texts(STORY))
def test_stories(folder, text):
    (folder / "story.yaml").write_bytes(text)
    used_or_refused("stories", lambda: read("story.yaml"), one_line)


YAML_PARTS = (
    "&a ", "*a", "<<: *a", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ",
    "!!python/name:os ",
    "!x ", "? ", ": ", "- ", "[", "]", "{", "}", ", ", "|\n", ">\n", "'", '"', "#", "%YAML 1.1\n---\n",
    "---\n", "...\n", "\t",
    "segments", "prompt", "seconds", "size", "seed: 1\n", "segments:\n  - {prompt: a, seconds: 3}\n", "3", "1e400",
    "0o7", "1:30",
    "2024-01-01", "\n", "  ", "~", "null", ".inf", ".nan", "=",
)  # fmt: skip


@drill(24, parts=st.lists(st.sampled_from(YAML_PARTS), max_size=30))
def test_yaml(folder, parts):
    (folder / "story.yaml").write_text("".join(parts))
    used_or_refused("stories", lambda: read("story.yaml"), one_line)


LINE_PARTS = (
    "0:00 A meadow.\n", "0:06", "1:02:03", "12.5", "0:00", "29999999", "31536000", "9" * 400, "0.0000001", " ", "[",
    "]", "[cut]",
    "[recache blend=2]", "[seed=7]", "[seed=99999999999999999999]", "seed=1", "blend=", "cut", "keep", "A meadow.",
    "\n", "\r\n",
    "\ufeff", "#", "\x00", "\u2028", "\u0663", "x" * 300, ":", ".", "1e9",
)  # fmt: skip


@drill(
    24,
    parts=st.lists(st.sampled_from(LINE_PARTS) | st.text(max_size=5), max_size=30),
    repeat=st.sampled_from((1, 1, 1, 400)),
)
def test_storyboards(folder, parts, repeat):
    text = "0:00 A meadow.\n" + "".join(parts) * repeat
    (folder / "board.txt").write_text(text, encoding="utf-8", errors="replace", newline="")
    story = used_or_refused("storyboards", lambda: read("board.txt"), one_line)
    if story is None:
        assert all(reason and "\n" not in reason for reason in wrong_lines(text, CARD.fps, CARD.memory.chunk).values())
    else:
        assert write_storyboard(story)


def test_ten_thousand_segments(folder):
    story = {**STORY, "segments": STORY["segments"] * 5000, "references": []}
    (folder / "story.yaml").write_text(yaml.dump(story, Dumper=yaml.CSafeDumper, default_flow_style=True))
    lines = "".join(f"{6 * n} A meadow.\n" for n in range(10_000)) + "60000"
    (folder / "board.txt").write_text(lines)
    (folder / "wrong.txt").write_text(lines.replace(" A meadow", ""))
    for name, expected in (("story.yaml", 10_000), ("board.txt", 10_000), ("wrong.txt", None)):
        found = used_or_refused("stories", lambda name=name: read(name), one_line)
        assert (found and len(found.segments)) == expected


CSV_PARTS = (
    "path,caption\n", "path,caption,start,end\n", "a.mp4,x\n", "a.mp4,x,1,2\n", "a.mp4,x,2,1\n", '"', ",",
    "\t", "\n", "\r", "\x00",
    "nan", "1e400", "-1", "x" * 200_000, "../../etc/passwd,x\n", "caption", "path", "é", "\ufeff",
)  # fmt: skip


@drill(
    20, name=st.sampled_from(("list.csv", "list.tsv", "list.txt", "videos/a.txt", "list.xyz")),
    text=st.lists(st.sampled_from(CSV_PARTS), max_size=12).map("".join), start=st.sampled_from(CSV_PARTS[:2]),
    raw=st.none() | st.binary(max_size=30),
)  # fmt: skip
def test_captions_and_prompt_lists(folder, name, text, start, raw):
    (folder / "videos").mkdir(exist_ok=True)
    (folder / "videos" / "a.mp4").touch()
    content = (start + text if name.endswith("sv") else text).encode()
    (folder / name).write_bytes(content if raw is None else raw)
    path = folder / name.split("/")[0]
    sources = used_or_refused("captions", lambda: list_sources(path.relative_to(folder)), one_line)
    assert all(len(one_line(each.problem)) <= 300 for each in sources or ())


RECORD = {
    "header": {"source": "/v", "model": "demo", "vae": "a", "text_encoder": "demo", "dtype": "fp16", "fps": 16,
               "size": [48, 32], "frames": 3, "version": 1},
    "clips": [{"source": "a.mp4", "clips": 1}, {"source": "b.mp4", "skipped": "too short"}],
}  # fmt: skip


@drill(16, record=mutated(RECORD), damage=st.booleans(), data=st.data())
def test_manifests_of_encoded_sets(folder, record, damage, data):
    header, clips = (record.get(key) for key in ("header", "clips")) if isinstance(record, dict) else (record, None)
    lines = [header, *(clips if isinstance(clips, list) else [clips])]
    text = "".join(f"{as_json(line)}\n" for line in lines).encode()
    (folder / "manifest.jsonl").write_bytes(data.draw(damaged(text)) if damage else text)
    used_or_refused("manifests", lambda: read_manifest("."), one_line)


@drill(24, tree=mutated(json.loads(CARD.to_json())), text=st.none() | texts)
def test_cards(tree, text):
    card = used_or_refused("cards", lambda: StudentCard.from_json(as_json(tree) if text is None else text), one_line)
    if card is not None:
        assert card.sigmas and StudentCard.from_json(card.to_json()) == card


JOBS = {
    "output": "out/{student}-{story}-{seed:04}.mp4", "stories": ["story.yaml", "board.txt"], "seeds": [1, 2],
    "students": ["demo", {"file": "demo", "name": "b", "set": ["shift=3"], "lora": [], "card": "auto",
    "weights": "auto"}],
    "options": {"policy": "novel", "slow": 3, "threshold": 0.9, "scale": 2, "dtype": "fp32", "offload": True,
                "commit_attends": "all", "kv_placement": "at once", "attention": "sdpa"},
}  # fmt: skip
PATTERNS = ("{seed:9999999999}.mp4", "{story:>{seed}}.mp4", "{story.x}.mp4", "{0}.mp4", "{story!r:99}.mp4", "{.mp4",
    "{seed:c}.mp4",
            "{number:%}.mp4", "../{story}.mp4", "{seed:.99999999f}.mp4", "{student[0]}.mp4",
            "/dev/full/{story}.mp4")  # fmt: skip


@drill(24, text=yaml_texts(JOBS), pattern=st.none() | st.sampled_from(PATTERNS))
def test_jobs_files(folder, text, pattern):
    """As `batch` reads them."""
    (folder / "story.yaml").write_text(as_json({**STORY, "references": []}))
    (folder / "board.txt").write_text("0:00 A meadow.\n0:06")
    (folder / "jobs.yaml").write_bytes(text if pattern is None else as_json({**JOBS, "output": pattern}).encode())
    jobs = used_or_refused("jobs files", lambda: Batch.of(read_jobs(Path("jobs.yaml"))), one_line)
    assert jobs is None or jobs.videos


FILE = {"name": "a.png", "sha256": "00"}
MADE = {
    **dict.fromkeys(("revision", "machine", "libraries", "device", "dtype", "attention", "student_file", "student",
    "weights", "published", "text_encoder", "text_encoder_file", "codec", "vae_file", "commit_attends"), "x"),
    "overrides": ["shift=3"], "loras": [FILE], "card": json.loads(CARD.to_json()), "scale": 3, "start": FILE,
    "memory": json.loads(CARD.to_json())["memory"], "memory_in": None, "references": [FILE, FILE], "story": STORY,
}  # fmt: skip


@pytest.fixture
def tags(monkeypatch):
    found = {}
    monkeypatch.setattr(provenance, "read_tags", lambda video: found)
    return found


@drill(24, tree=mutated(MADE), text=st.none() | st.sampled_from(TEXTS))
def test_what_a_video_says_made_it(tags, tree, text):
    tags[provenance.TAG] = as_json(tree) if text is None else text
    rows = used_or_refused("tags of videos", lambda: provenance.describe("film.mp4"))
    assert all(value.isprintable() and name.isprintable() for name, value in rows or ())


def test_the_tags_of_a_whole_video_are_read(tags):
    tags[provenance.TAG] = as_json(MADE)
    assert provenance.read_provenance("film.mp4").tags()


SETTING_VALUES = values.map(str) | st.sampled_from(
    ("[1,2]", "{a: 1}", "&a [*a]", "demo", "released", "1e-3", "1,2", "true", "key=")
)


def paths_of(config, prefix=""):
    """The names of all settings of a configuration, those of its parts with a dot."""
    for name, value in vars(config).items():
        yield f"{prefix}{name}"
        if hasattr(value, "__dataclass_fields__"):
            yield from paths_of(value, f"{prefix}{name}.")


@drill(48, data=st.data(), in_file=st.booleans())
def test_training_settings(folder, data, in_file):
    """As `train --dry-run` reads them: names, values, a YAML file, and the plan of what is accepted."""
    stage = data.draw(st.sampled_from(sorted(CONFIGS)))
    name = data.draw(st.sampled_from(sorted(CONFIGS[stage])))
    known = st.sampled_from(sorted(paths_of(CONFIGS[stage][name]))) | texts
    if in_file:
        names = st.dictionaries(known.map(lambda key: key.split(".")[0]), values, max_size=3)
        tree = {"config": name, **data.draw(names)}
        (folder / "settings.yaml").write_bytes(data.draw(yaml_texts(tree)))
        overrides, name = [], "settings.yaml"
    else:
        overrides = [
            f"{key}={value}" for key, value in data.draw(st.lists(st.tuples(known, SETTING_VALUES), max_size=3))
        ]
    tflops = data.draw(st.none() | scalars.filter(lambda value: isinstance(value, float) and value >= 1e-9))
    used_or_refused("training settings", lambda: plan_stage(stage, name, overrides, tflops), one_line)
