"""Videos -> encoded sets: frames and captions match, bad files are skipped, killed runs continue."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from context_forcing import cli
from context_forcing.model.codecs.demo_text import encode_demo_text
from context_forcing.model.segment import used_rows
from context_forcing.train.data import encode as encode_module
from context_forcing.train.data.encode import Encoder, EncodeSettings, SetEncoder, load_encoder
from context_forcing.train.data.manifest import read_manifest
from context_forcing.train.data.shards import NEGATIVE_TEXT, EncodedSet

from .videos import CAPTION, CLIP, LENGTHS, SETTINGS, contents, film, run, tensors, world_frames


@pytest.fixture(scope="module")
def whole_set(whole_videos, tmp_path_factory):
    """What a run gives that nothing stops."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    run(whole_videos, folder)
    return folder


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


def test_the_negative_prompt_is_added_to_a_finished_set(whole_set, tmp_path):
    folder = shutil.copytree(whole_set, tmp_path / "set")
    with pytest.raises(ValueError, match="negative_prompt: 'snow at night' is not in"):
        EncodedSet(folder, 0).negative("snow at night")
    for prompt in ("fog", "snow at night", "snow at night"):
        source = Path(read_manifest(folder).header.source)
        assert run(source, folder, dataclasses.replace(SETTINGS, negative_prompt=prompt)).new_clips == 0
    encoded = EncodedSet(folder, 0)
    expected = used_rows(encode_demo_text("snow at night")).half().float()
    assert torch.equal(encoded.negative("snow at night"), expected) and len(expected[0]) == 2
    assert torch.equal(encoded.negative(""), encoded.empty)
    (folder / NEGATIVE_TEXT).unlink()
    assert contents(folder) == contents(whole_set), "nothing else was touched"


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
        "short.mp4": "too short: 12 frames at 16 frames/s, a clip takes 13 (0.81 s); --frames 3 takes 9",
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
    assert len(kept) == after == len(EncodedSet(tmp_path / "set", 0).entries), "clips of the running shard too"
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
    assert "skipped junk.mp4: does not decode" in err and "6 clips (2 new) of 4 sources, 1 skipped" in err
    assert EncodedSet(tmp_path / "set", 0).sample(0)[0].shape == (1, 16, 4, 4, 8)


@pytest.fixture
def interruptible():
    """A shell's background commands ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("interruptible")
def test_a_signal_ends_the_command_and_its_clips_stay(whole_videos, tmp_path, command, monkeypatch, number):
    arguments, encoded, latents = (whole_videos, "-o", tmp_path / "set", "--frames", 4), [], Encoder.latents

    def encode(encoder, pixels):
        encoded.append(pixels)
        if len(encoded) == 4:
            os.kill(os.getpid(), number)
        return latents(encoder, pixels)

    monkeypatch.setattr(Encoder, "latents", encode)
    assert command(*arguments)[0] == 130
    assert len(EncodedSet(tmp_path / "set", 0).entries) == 3
    code, err = command(*arguments)
    assert code == 0 and "6 clips (3 new)" in err and len(encoded) == 4 + 3
    assert command(whole_videos, "-o", tmp_path / "whole", "--frames", 4)[0] == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_set_without_clips_begins_again_with_other_settings(videos, tmp_path, command):
    code, err = command(videos, "-o", tmp_path / "set", "--size", "64x32")
    assert code == 2 and "0 clips (0 new) of 3 sources, 3 skipped" in err and "gives no clip" in err
    code, err = command(videos, "-o", tmp_path / "set", "--size", "64x32", "--frames", 4)
    assert code == 0 and "6 clips (6 new) of 3 sources, 0 skipped" in err
    assert command(videos, "-o", tmp_path / "other", "--size", "64x32", "--frames", 4)[0] == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "other")


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
