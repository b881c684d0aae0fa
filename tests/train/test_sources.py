"""Sources of encoded sets: folders, tables, lists of prompts."""

import json

import pytest
import torch

from context_forcing.model.codecs.demo_text import encode_demo_text
from context_forcing.train.data.manifest import MANIFEST, read_manifest
from context_forcing.train.data.shards import EncodedSet
from context_forcing.train.data.sources import list_sources

from .videos import CLIP, run


@pytest.mark.parametrize("suffix, delimiter", [(".csv", ","), (".tsv", "\t")])
def test_tables(videos, tmp_path, suffix, delimiter):
    table = videos / f"clips{suffix}"
    rows = [
        ["caption", "path", "start", "end", "note"],
        ['"Snow, at night\nand fog"', "a.mp4", "", "", ""],
        ["desert", "sub/c.mp4", "", "", "x"],
        ["desert by day", "b.mp4", "0.5", "1.5", ""],
        ["dusk", "b.mp4", "2", "", ""],
        ["night", "gone.mp4", "", "", ""],
        ["", "b.mp4", "", "", ""],
    ]
    table.write_text("\n".join(delimiter.join(row) for row in rows) + "\n")
    encoder = run(table, tmp_path / "set")
    entries = [(e.source, e.start, e.caption) for e in read_manifest(tmp_path / "set").entries]
    assert entries == [
        ("a.mp4", 0.0, "Snow, at night and fog"),
        ("a.mp4", CLIP / 16, "Snow, at night and fog"),
        ("sub/c.mp4", 0.0, "desert"),
        ("b.mp4@0.5-1.5", 0.5, "desert by day"),
    ]
    assert encoder.skipped.keys() == {"b.mp4@2-", "gone.mp4", "b.mp4"}
    assert encoder.skipped["b.mp4@2-"].startswith("too short") and "no such file" in encoder.skipped["gone.mp4"]


BAD_TABLES = {
    "no path": ("caption\nx\n", "no column 'path'"),
    "no caption": ("path\nx\n", "no column 'caption'"),
    "start is a word": ("path,caption,start\na.mp4,x,soon\n", "line 2: start: 'soon'"),
    "start is negative": ("path,caption,start\na.mp4,x,-1\n", "line 2: start: '-1'"),
    "end is not finite": ("path,caption,end\na.mp4,x,inf\n", "line 2: end: 'inf'"),
    "end before start": ("path,caption,start,end\na.mp4,x,2,1\n", "line 2: end: 1 must be after start, 2"),
    "a clip twice": ("path,caption\na.mp4,x\na.mp4,y\n", "line 3: path: a.mp4 is in the table already"),
    "too many fields": ("path,caption\na.mp4,x,y\n", "line 2 has another number of fields"),
    "too few fields": ("path,caption\na.mp4\n", "line 2 has another number of fields"),
    "no rows": ("path,caption\n", "holds nothing to encode"),
    "empty": ("", "no column 'path'"),
}


@pytest.mark.parametrize("text, message", BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_bad_tables(tmp_path, text, message):
    table = tmp_path / "clips.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        list_sources(table)


def test_prompts(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A meadow by day\n\n  snow at   night\nA meadow by day\ndragons\n")
    encoder = run(prompts, tmp_path / "set")
    assert encoder.num_clips == 3
    header = json.loads((tmp_path / "set" / MANIFEST).read_text().splitlines()[0])
    assert header["vae"] is header["frames"] is header["size"] is None and header["text_encoder"] == "demo"
    encoded = EncodedSet(tmp_path / "set", 0)
    entries = [encoded.entry(number) for number in range(3)]
    for number, entry in enumerate(entries):
        text, expected = encoded.text(number), encode_demo_text(entry.caption).half().float()
        rows = text.shape[1]
        assert 1 <= rows <= 2 and torch.equal(text, expected[:, :rows]) and not expected[:, rows:].any()
    assert {entry.caption for entry in entries} == {"A meadow by day", "snow at night", "dragons"}
    prompts.write_text(prompts.read_text() + "fog\n")
    assert run(prompts, tmp_path / "set").new_clips == 1


def test_a_published_list_has_a_caption_per_line(tmp_path):
    """As vidprom_filtered_extended.txt: long lines with commas, quotes and any script; Windows line ends, a BOM."""
    captions = [
        'A cat, "Tom", runs; the camera pans left.',
        "\u96ea\u5c71, at night " + "very " * 200 + "dark",
        "it's 1,000 birds",
    ]
    lines = tmp_path / "vidprom_filtered_extended.txt"
    lines.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["a\u2028b", *captions]).encode())
    assert [source.caption for source in list_sources(lines)] == ["a b", *captions]
