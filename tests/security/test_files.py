"""Files from strangers (docs/security.md): what ffmpeg reads, bombs, and names that lead elsewhere."""

import os
import resource
import socket
import struct
import sys
import threading
import zlib

import pytest
import yaml
from PIL import Image

from context_forcing.video import pipeline, reading
from context_forcing.video.reading import VideoError, check_video, read_frames, read_runs, read_tags

STORY = {"size": [48, 32], "segments": [{"prompt": "a meadow", "seconds": 0.75}]}
READERS = {
    "check": lambda path: check_video(path),
    "runs": lambda path: list(read_runs(path, 4, (48, 32), 16)),
    "frames": lambda path: list(read_frames(path)[1]),
    "tags": lambda path: read_tags(path),
}


@pytest.fixture
def generate(run, student, tmp_path, monkeypatch):
    (tmp_path / "story.yaml").write_text(yaml.safe_dump(STORY))
    monkeypatch.chdir(tmp_path)
    options = ("--student", student, "--scale", 1)
    return lambda *more: run("generate", "story.yaml", "-o", "film.mp4", *options, *more)


@pytest.fixture
def visitors():
    """A server on this machine, and the number of connections to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = []

        def wait():
            while True:
                try:
                    found.append(server.accept()[0].close())
                except OSError:
                    return

        threading.Thread(target=wait, daemon=True).start()
        yield server.getsockname()[1], found
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.skipif(os.name == "nt", reason="names with a colon are streams of a file there")
@pytest.mark.parametrize("name", ["-i.png", "http:a.png", "concat:a|b.png", "data:a.png", "pipe:0.png", "100%.png"])
def test_no_protocol_or_option_in_the_name_of_a_picture(generate, succeeded, tmp_path, name):
    Image.new("RGB", (96, 64), (40, 160, 90)).save(tmp_path / name)
    succeeded(generate(f"--start={name}"))


LISTS = {
    "concat": "ffconcat version 1.0\nfile secret.png\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
    "hls of files": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.png\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet>'
    "<BaseURL>http://127.0.0.1:{port}/</BaseURL></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n",
    "text": "The contents of another file, drawn as a video.\n" * 40,
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_no_other_file_and_no_address_is_read_through_a_list(tmp_path, visitors, text, reader):
    port, found = visitors
    Image.new("RGB", (48, 32), (200, 0, 0)).save(tmp_path / "secret.png")
    (tmp_path / "film.mp4").write_text(text.format(port=port))
    with pytest.raises(VideoError, match="does not decode|finds no video"):
        reader(tmp_path / "film.mp4")
    assert not found


def test_a_name_is_no_series_of_pictures(tmp_path):
    Image.new("RGB", (48, 32)).save(tmp_path / "shot1.png")
    with pytest.raises(VideoError, match="no such file"):
        check_video(tmp_path / "shot%d.png")
    (tmp_path / "shot%d.png").write_bytes((tmp_path / "shot1.png").read_bytes())
    with pytest.raises(VideoError, match="names with %d"):
        check_video(tmp_path / "shot%d.png")


def png_of(width, height, num_rows):
    """A PNG of one colour and a few bytes that holds so many rows, whatever its size."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(num_rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif_of(width, height, frames, delay):
    """A GIF of one-pixel frames on a large canvas, each shown for `delay` hundredths of a second."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    control = b"\x21\xf9\x04\0" + struct.pack("<H", delay) + b"\0\0"
    frame = control + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + frame * frames + b"\x3b"


BOMBS = {
    "pixels of a PNG": ("bomb.png", lambda: png_of(16000, 16000, 16000)),
    "a PNG that claims the most": ("bomb.png", lambda: png_of(2**31 - 1, 2**31 - 1, 0)),
    "a PNG of 65,536 squared": ("bomb.png", lambda: png_of(65536, 65536, 999)),
    "the canvas of a GIF": ("bomb.gif", lambda: gif_of(65535, 65535, 2, 10)),
}


@pytest.mark.skipif(sys.platform == "win32", reason="the memory of a child is not counted there")
@pytest.mark.parametrize("name, make", BOMBS.values(), ids=BOMBS)
def test_a_small_file_that_becomes_large_is_refused(generate, refused, tmp_path, name, make):
    (tmp_path / name).write_bytes(make())
    assert (tmp_path / name).stat().st_size < 2**16
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    refused(generate("--start", name), f"start: {name}: does not decode")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # A child has the memory of this process until it runs ffmpeg.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after.ru_utime - children.ru_utime < 5 and after.ru_maxrss <= max(children.ru_maxrss, own, 2**18), "256 MiB"
    with pytest.raises(VideoError):
        list(read_frames(tmp_path / name)[1])


def test_a_small_file_that_becomes_long_is_refused(generate, refused, tmp_path, monkeypatch):
    """655 s a frame; the limit of 2 GiB is made smaller here."""
    monkeypatch.setattr(pipeline, "MAX_START_BYTES", 2**24)
    (tmp_path / "long.gif").write_bytes(gif_of(48, 32, 200, 65535))
    assert (tmp_path / "long.gif").stat().st_size < 2**16
    refused(generate("--start", "long.gif"), "start: long.gif: is too long, 228 s of 48x32 are read at most; cut it")
    assert not (tmp_path / "film.mp4").exists()


def test_the_largest_pictures_of_cameras_are_read():
    assert 8064 * 6048 < reading.MAX_INPUT_PIXELS and 7680 * 4320 < reading.MAX_INPUT_PIXELS
