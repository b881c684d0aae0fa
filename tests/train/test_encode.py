"""Videos -> sets: the right frames with the right words, whatever is wrong with a file, however often it is killed."""

import json
import os
import shutil
import signal

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from context_forcing import cli
from context_forcing.model.codecs.base import WAN_MEAN, WAN_STD
from context_forcing.model.codecs.demo_text import encode_demo_text
from context_forcing.model.codecs.umt5 import clean_text
from context_forcing.train.data import encode as encode_module
from context_forcing.train.data.clips import random_clip
from context_forcing.train.data.encode import Encoder, EncodeSettings, SetEncoder, load_encoder
from context_forcing.train.data.shards import MANIFEST, EncodedSet, open_shard, read_manifest
from context_forcing.train.data.sources import Source, list_sources
from context_forcing.train.world.camera import view
from context_forcing.train.world.geometry import TOKEN
from context_forcing.train.world.scene import panorama
from context_forcing.video.mp4 import write_video
from context_forcing.video.reading import VideoError, check_video, read_runs

CLIP = 13
"""Pixel frames of a clip of four latent frames."""
SETTINGS = EncodeSettings(frames=4)
CAPTION = "A meadow by day. The camera pans right."


def world_frames(seed, num_frames):
    """True frames of the demo world, uint8 [num_frames, 64, 128, 3]."""
    clip = random_clip(np.random.default_rng(seed), num_frames // 12 + 1, 3, 0.5)
    # Between two latent frames the camera turns by at most a token of 8 art pixels, 2 in each of 4 pixel frames.
    lefts = np.interp(np.arange(num_frames) / 4, np.arange(len(clip.headings)), clip.headings * TOKEN).astype(int)
    rings = [panorama(clip.scene, style) for style in clip.styles]
    frames = [view(rings[(i + 3) // 12], left) for i, left in enumerate(lefts)]
    return np.stack(frames).repeat(2, axis=1).repeat(2, axis=2)


def film(path, frames_THWC, fps=16, caption=CAPTION):
    """A video, and its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.from_numpy(frames_THWC).float() / 127.5 - 1
    write_video(path, [pixels.movedim(-1, 0)[None]], fps=fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


LENGTHS = {"a.mp4": 30, "b.mp4": 41, "sub/c.mp4": 13}
"""Pixel frames: 2, 3 and 1 clips."""


@pytest.fixture(scope="session")
def whole_videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for seed, (name, length) in enumerate(LENGTHS.items()):
        film(folder / name, world_frames(seed, length))
    return folder


@pytest.fixture
def videos(whole_videos, tmp_path):
    """Three good videos in a folder of one's own."""
    return shutil.copytree(whole_videos, tmp_path / "videos")


def run(source, output, settings=SETTINGS, shard_bytes=60_000):
    """Encode into small shards: three clips of 32 kB or less each."""
    encoder = SetEncoder(source, output, settings)
    encoder.writer.shard_bytes = shard_bytes
    encoder.run()
    return encoder


def contents(folder):
    """Everything a set says and holds."""
    return (folder / MANIFEST).read_text(), {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole_set(whole_videos, tmp_path_factory):
    """What a run gives that nothing stops."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    run(whole_videos, folder)
    return folder


def tensors(folder, entry):
    """(latents, text) of a clip."""
    file = open_shard(folder / entry.shard)
    return file.get_tensor(f"{entry.key}.latents"), file.get_tensor(f"{entry.key}.text")


def test_clips_are_the_videos_consecutive_frames(videos, tmp_path):
    encoder = run(videos, tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    assert encoder.num_clips == encoder.new_clips == 6 and not encoder.skipped
    assert manifest.finished == {"a.mp4": 2, "b.mp4": 3, "sub/c.mp4": 1}
    step = CLIP / 16
    assert [(e.source, e.start) for e in manifest.entries] == [
        ("a.mp4", 0), ("a.mp4", step), ("b.mp4", 0), ("b.mp4", step), ("b.mp4", 2 * step), ("sub/c.mp4", 0),
    ]  # fmt: skip
    codec, wrong = load_encoder(SETTINGS, with_vae=True), []
    for entry in manifest.entries:
        latents, text = tensors(tmp_path / "set", entry)
        assert latents.shape == (16, 4, 8, 16) and latents.dtype == torch.float16
        true = world_frames(list(LENGTHS).index(entry.source), LENGTHS[entry.source])
        first = round(entry.start * 16)
        away = [(codec.latents(true[i : i + CLIP]) - latents).abs().mean() for i in (first, max(0, first - 1))]
        assert away[0] < 0.1, "H.264 loses a little"
        wrong.append(away[1] > 2 * away[0])
        assert entry.caption == CAPTION
        assert torch.equal(text, encode_demo_text(CAPTION)[0, :4].half())
    assert any(wrong), "one frame off would be seen"


def test_a_set_can_be_trained_on(videos, tmp_path):
    run(videos, tmp_path / "set", EncodeSettings(frames=4, dtype="bf16"))
    encoded = EncodedSet(tmp_path / "set", 0)
    samples = [encoded.sample(number) for number in range(6)]
    assert all(latents.shape == (1, 16, 4, 8, 16) and text.shape == (1, 4, 4096) for latents, text in samples)
    assert len({encoded.entry(number).source for number in range(6)}) == 3
    assert encoded.empty.shape == (1, 1, 4096)
    assert torch.cat([latents for latents, _ in samples]).std() > 0.3, "normalised latents have the size of noise"


def test_a_second_run_does_nothing(videos, tmp_path, monkeypatch):
    run(videos, tmp_path / "set")
    before = contents(tmp_path / "set")
    monkeypatch.setattr(encode_module, "check_video", lambda *part: pytest.fail("looked at again"))
    encoder = run(videos, tmp_path / "set")
    assert encoder.num_clips == 6 and encoder.new_clips == 0
    assert contents(tmp_path / "set") == before


def test_videos_that_are_added_later_are_encoded(videos, tmp_path):
    run(videos, tmp_path / "set")
    before = read_manifest(tmp_path / "set").entries
    film(videos / "0.mp4", world_frames(9, 13))
    assert run(videos, tmp_path / "set").new_clips == 1
    entries = read_manifest(tmp_path / "set").entries
    assert entries[:-1] == before and entries[-1].source == "0.mp4"
    assert len(EncodedSet(tmp_path / "set", 0).entries) == 7


def test_what_is_wrong_with_a_file_is_reported(videos, tmp_path):
    good = (videos / "b.mp4").read_bytes()
    (videos / "junk.mp4").write_bytes(os.urandom(3000))
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "cut.mp4").write_bytes(good[: len(good) * 2 // 3])
    for name in ("junk", "empty", "cut"):
        (videos / f"{name}.txt").write_text(CAPTION)
    film(videos / "short.mp4", world_frames(5, 12))
    film(videos / "mute.mp4", world_frames(5, 13), caption=None)
    film(videos / "blank.mp4", world_frames(5, 13), caption=" \n")
    film(videos / "latin.mp4", world_frames(5, 13))
    (videos / "latin.txt").write_bytes("café".encode("latin-1"))
    (videos / "notes.md").write_text("not a video")
    (videos / ".hidden.mp4").write_bytes(b"not looked at")
    encoder = run(videos, tmp_path / "set")
    assert encoder.num_clips == 6, "the good ones are all there"
    reasons = {
        "junk.mp4": "does not decode", "empty.mp4": "does not decode", "cut.mp4": "does not decode",
        "short.mp4": "too short: 12 frames at 16 frames/s, a clip takes 13",
        "mute.mp4": "no caption: there is no mute.txt", "blank.mp4": "blank.txt is empty", "latin.mp4": "not UTF-8",
    }  # fmt: skip
    assert encoder.skipped.keys() == reasons.keys()
    assert all(reasons[name] in encoder.skipped[name] for name in reasons), encoder.skipped
    assert read_manifest(tmp_path / "set").skipped == encoder.skipped
    before = contents(tmp_path / "set")
    assert run(videos, tmp_path / "set").new_clips == 0 and contents(tmp_path / "set") == before

    (videos / "mute.txt").write_text(CAPTION)
    assert run(videos, tmp_path / "set").new_clips == 0, "skipped stays skipped"
    again = run(videos, tmp_path / "set", EncodeSettings(frames=4, retry=True))
    assert again.new_clips == 1 and again.skipped.keys() == reasons.keys() - {"mute.mp4"}
    assert read_manifest(tmp_path / "set").skipped == again.skipped


class Stop(Exception):
    """What stops a run from outside."""


@pytest.mark.parametrize("after", range(1, 7))
def test_an_exception_at_any_clip_and_the_same_command_give_the_same_set(whole_videos, whole_set, tmp_path, after):
    encoder = SetEncoder(whole_videos, tmp_path / "set", SETTINGS)
    encoder.writer.shard_bytes = 60_000

    def stop(num_sources):
        if encoder.new_clips == after:
            raise Stop

    with pytest.raises(Stop):
        encoder.run(stop)
    kept = read_manifest(tmp_path / "set").entries
    run(whole_videos, tmp_path / "set")
    assert read_manifest(tmp_path / "set").entries[: len(kept)] == kept
    assert contents(tmp_path / "set") == contents(whole_set)


def run_until_killed(source, output, writes):
    """Encode in a process that dies by SIGKILL in its `writes`-th fsync or rename; True if it died."""
    child = os.fork()
    if child == 0:
        left = writes

        def deadly(true):
            def call(*args):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return true(*args)

            return call

        try:
            os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
            run(source, output)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("writes", [2, 4, 5, 6, 8])
def test_sigkill_anywhere_and_the_same_command_give_the_same_set(whole_videos, whole_set, tmp_path, writes):
    """Before the set has its header, in the middle of a shard, between a shard and its lines, and later."""
    assert run_until_killed(whole_videos, tmp_path / "set", writes)
    run(whole_videos, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(whole_set)
    assert len(EncodedSet(tmp_path / "set", 0).entries) == 6


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_set(whole_videos, whole_set, tmp_path):
    kills = 0
    while run_until_killed(whole_videos, tmp_path / "set", 5):
        kills += 1
        assert kills < 20
    assert kills >= 2
    assert contents(tmp_path / "set") == contents(whole_set)


def test_max_clips_stops_and_more_goes_on(videos, tmp_path):
    def limited(count):
        return run(videos, tmp_path / "set", EncodeSettings(frames=4, max_clips=count))

    assert limited(3).num_clips == 3
    assert limited(3).new_clips == 0
    assert limited(5).num_clips == 5
    assert run(videos, tmp_path / "set").num_clips == 6
    run(videos, tmp_path / "whole")
    here, there = (read_manifest(tmp_path / name).entries for name in ("set", "whole"))
    assert [(e.source, e.start, e.key) for e in here] == [(e.source, e.start, e.key) for e in there]


def test_another_header_is_refused(videos, tmp_path):
    run(videos, tmp_path / "set")
    before = contents(tmp_path / "set")
    for change, message in (
        (dict(frames=5), "frames: 5 now, 4 when"),
        (dict(frames=4, fps=8), "fps: 8 now, 16 when"),
        (dict(frames=4, size=(64, 32)), r"size: \(64, 32\) now, \(128, 64\) when"),
        (dict(frames=4, dtype="bf16"), "dtype: bf16 now, fp16 when"),
    ):
        with pytest.raises(ValueError, match=message):
            SetEncoder(videos, tmp_path / "set", EncodeSettings(**change))
    with pytest.raises(ValueError, match="source: "):
        SetEncoder(videos / "sub", tmp_path / "set", SETTINGS)
    assert contents(tmp_path / "set") == before


def test_latents_that_do_not_fit_the_type_are_reported(videos, tmp_path, monkeypatch):
    huge = torch.full((16, 4, 8, 16), 1e5)
    monkeypatch.setattr(Encoder, "latents", lambda self, pixels: huge)
    encoder = run(videos, tmp_path / "set")
    assert encoder.num_clips == 0 and all("not finite in fp16" in reason for reason in encoder.skipped.values())
    assert run(videos, tmp_path / "bf16", EncodeSettings(frames=4, dtype="bf16")).num_clips == 6


def bars(height, width):
    """A picture of three upright bars: red, green, blue."""
    picture = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        picture[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 220
    return picture


def test_pixels_are_resampled_resized_and_cropped_to_the_centre(tmp_path):
    brightness = np.repeat(np.arange(8, dtype=np.uint8) * 30, 4)
    frames = np.broadcast_to(brightness[:, None, None, None], (32, 48, 96, 3)).copy()
    film(tmp_path / "ramp.mp4", frames, fps=32)
    (found,) = read_runs(tmp_path / "ramp.mp4", 16, (32, 16), fps=16)
    assert found.shape == (16, 16, 32, 3), "half the frames, half the second"
    assert np.abs(found.mean((1, 2, 3)) - brightness[::2]).max() < 20 and (np.diff(found.mean((1, 2, 3))) > -3).all()

    film(tmp_path / "bars.mp4", np.stack([bars(48, 144)] * 5))
    for size in ((48, 48), (32, 32), (96, 96)):
        (found,) = read_runs(tmp_path / "bars.mp4", 5, size, fps=16)
        middle = found[:, :, size[0] // 8 : -size[0] // 8].reshape(-1, 3).mean(0)
        assert middle[1] > 180 and middle[0] < 30 and middle[2] < 30, "only the green middle is left"


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    writer = imageio_ffmpeg.write_frames(
        str(tmp_path / "wide.mp4"), (48, 48), fps=16, codec="libx264", macro_block_size=1,
        output_params=["-vf", "setsar=3"], ffmpeg_log_level="error",
    )  # fmt: skip
    writer.send(None)
    for _ in range(5):
        writer.send(bars(48, 48))
    writer.close()
    (found,) = read_runs(tmp_path / "wide.mp4", 5, (48, 48), fps=16)
    middle = found[:, :, 8:-8].reshape(-1, 3).mean(0)
    assert middle[1] > 150 and middle[0] < 60 and middle[2] < 60, "shown at 144 x 48, the middle is green"


def test_a_part_of_a_video(whole_videos):
    whole = np.concatenate(list(read_runs(whole_videos / "b.mp4", 7, (128, 64), 16)))
    assert len(whole) == 41
    part = Source(name="b", video=whole_videos / "b.mp4", start=0.5, end=1.5)
    check_video(part.video, part.start, part.end)
    assert np.array_equal(
        np.concatenate(list(read_runs(part.video, 7, (128, 64), 16, start=part.start, end=part.end))), whole[8:24]
    )
    assert np.array_equal(
        np.concatenate(list(read_runs(part.video, 7, (128, 64), 16, start=part.start, end=part.end, skip=1))),
        whole[15:24],
    )


def test_a_file_without_pictures(tmp_path):
    (tmp_path / "none.mp4").write_text("x")
    with pytest.raises(VideoError, match="does not decode"):
        check_video(tmp_path / "none.mp4")
    with pytest.raises(VideoError, match="does not decode"):
        list(read_runs(tmp_path / "none.mp4", 5, (16, 16), 16))
    with pytest.raises(VideoError, match="there is no such file"):
        check_video(tmp_path / "gone.mp4")


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
    "too many fields": ("path,caption\na.mp4,x,y\n", "line 2 has not as many fields"),
    "too few fields": ("path,caption\na.mp4\n", "line 2 has not as many fields"),
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


@pytest.fixture
def command(monkeypatch, capsys):
    """(arguments) -> exit code, stderr of `context-forcing encode`."""

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["context-forcing", "encode", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, capsys.readouterr().err

    return command


def test_the_command_sums_up(videos, tmp_path, command):
    (videos / "junk.mp4").write_bytes(b"junk")
    (videos / "junk.txt").write_text("junk")
    code, err = command(videos, "-o", tmp_path / "set", "--frames", 4, "--size", "64x32", "--max-clips", 4)
    assert code == 0 and "4 clips (4 new)" in " ".join(err.split())
    code, err = command(videos, "-o", tmp_path / "set", "--frames", 4, "--size", "64x32")
    assert code == 0, err
    assert "skipped junk.mp4: does not decode" in err and "6 clips (2 new) of 3 sources, 1 skipped" in err
    assert EncodedSet(tmp_path / "set", 0).sample(0)[0].shape == (1, 16, 4, 4, 8)


BAD_COMMANDS = {
    "no such source": (["none"], ["source", "none", "does not exist"]),
    "no source of ours": (["a.mp4"], ["source", "a.mp4", "folder of videos"]),
    "no videos": (["empty"], ["source", "empty", "nothing to encode"]),
    "size is no size": ([".", "--size", "64"], ["size", "'64'", "WIDTHxHEIGHT"]),
    "size not a multiple": ([".", "--size", "60x32"], ["size", "60", "16"]),
    "unknown type": ([".", "--dtype", "fp8"], ["dtype", "fp8", "fp16, bf16"]),
    "unknown device": ([".", "--device", "tpu"], ["device", "tpu"]),
    "no such model": ([".", "--model", "wan"], ["model", "wan", "vae", "diffusers"]),
}


@pytest.mark.parametrize("arguments, words", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_mistakes_are_one_line_and_write_nothing(videos, tmp_path, monkeypatch, command, arguments, words):
    monkeypatch.chdir(videos)
    (videos / "empty").mkdir()
    code, err = command(*arguments, "-o", tmp_path / "set")
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert all(word in err for word in words), err
    assert not (tmp_path / "set").exists()


def test_an_output_that_is_a_file(videos, tmp_path, command):
    (tmp_path / "set").write_text("precious")
    code, err = command(videos, "-o", tmp_path / "set")
    assert code == 2 and "output" in err and len(err.strip().splitlines()) == 1
    assert (tmp_path / "set").read_text() == "precious"


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(ValueError, match=r"ftfy is not installed; pip install 'context-forcing\[wan\]'"):
        load_encoder(EncodeSettings(model=str(tmp_path)), with_vae=False)


def test_text_is_cleaned_as_wan_does():
    pytest.importorskip("ftfy")
    assert clean_text(" a  &amp;amp; b\n\tthe camÃ©ra ") == "a & b the caméra"


VOCABULARY = "a meadow by day the camera pans right & snow at night".split()


def make_tiny_wan(folder):
    """Wan's VAE and UMT5 as libraries write them, tiny and random."""
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    sizes = dict(vocab_size=32, d_model=4096, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(folder / "text_encoder")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *VOCABULARY])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def tiny_wan(tmp_path_factory):
    for library in ("diffusers", "transformers", "ftfy"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("wan")
    make_tiny_wan(folder)
    return folder


WAN = dict(frames=4, size=(64, 48))


@pytest.mark.slow
def test_wan_latents_and_text_are_what_the_libraries_give(tiny_wan, whole_videos, tmp_path):
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, UMT5EncoderModel

    run(whole_videos, tmp_path / "set", EncodeSettings(model=str(tiny_wan), **WAN))
    manifest = read_manifest(tmp_path / "set")
    assert len(manifest.entries) == 6 and manifest.header.model == tiny_wan.name
    latents, text = tensors(tmp_path / "set", manifest.entries[1])

    vae = AutoencoderKLWan.from_pretrained(tiny_wan / "vae").eval()
    runs = list(read_runs(whole_videos / "a.mp4", CLIP, (64, 48), 16))
    pixels = torch.from_numpy(runs[1].copy()).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mean
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (WAN_MEAN, WAN_STD))
    torch.testing.assert_close(latents.float(), ((raw - mean) / std)[0], atol=1e-3, rtol=1e-3)

    umt5 = UMT5EncoderModel.from_pretrained(tiny_wan / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_wan / "tokenizer")
    padded = tokenizer(CAPTION, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    with torch.no_grad():
        rows = umt5(padded.input_ids, attention_mask=padded.attention_mask).last_hidden_state[0]
    length = int(padded.attention_mask.sum())
    assert len(text) == length < 512
    torch.testing.assert_close(text.float(), rows[:length], atol=2e-3, rtol=2e-3)
    assert EncodedSet(tmp_path / "set", 0).sample(5)[0].shape == (1, 16, 4, 6, 8)
    assert len(load_encoder(EncodeSettings(model=str(tiny_wan)), False).text("day " * 600)) == 512


@pytest.mark.slow
def test_a_wan_folder_with_something_else_in_it_is_refused(tiny_wan, whole_videos, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import UMT5Config, UMT5EncoderModel

    def refused(folder, message):
        with pytest.raises(ValueError, match=message):
            SetEncoder(whole_videos, tmp_path / "set", EncodeSettings(model=str(folder), **WAN))
        assert not (tmp_path / "set").exists()

    other = shutil.copytree(tiny_wan, tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({key: value for key, value in state.items() if key != "quant_conv.weight"}, weights)
    refused(other, "tensors missing, extra or of another shape, first conv1.weight")
    save_file(state, weights)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "latents_mean": [0.0] * 16}))
    refused(other, "latents_mean is not that of Wan 2.1's VAE")
    (other / "vae" / "config.json").write_text(json.dumps(config))
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(other, "not a whole safetensors file")
    save_file(state, weights)
    small = UMT5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    UMT5EncoderModel(small).save_pretrained(other / "text_encoder")
    refused(other, "text_encoder: has width 32, Wan 2.1 takes 4096")
    shutil.rmtree(other / "tokenizer")
    refused(other, "has no folder tokenizer")
