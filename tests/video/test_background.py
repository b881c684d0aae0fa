"""Work on a second thread: in order, with a bounded queue, and nothing left behind after an error or an interrupt."""

import contextlib
import os
import signal
import threading
import time
import weakref
from concurrent.futures import Future

import pytest
import torch

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.video.background import ROOM, StoppedError, in_background
from context_forcing.video.mp4 import write_video
from context_forcing.video.pipeline import Pipeline

posix = pytest.mark.skipif(os.name == "nt", reason="a signal interrupts the thread")


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("context_forcing")]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert not threads()


def wait(seconds, until):
    ends = time.monotonic() + seconds
    while not until() and time.monotonic() < ends:
        time.sleep(0.01)


@contextlib.contextmanager
def interrupted(once):
    """SIGINT for this thread, as Ctrl-C sends it, soon after `once` is true."""

    def interrupt(thread):
        wait(30, once)
        time.sleep(0.2)
        signal.pthread_kill(thread, signal.SIGINT)

    # A shell that starts the tests in the background lets them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt, args=(threading.get_ident(),))
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


def test_items_come_in_order_and_the_result_returns():
    def work(items, at_stop):
        assert threading.current_thread() is not threading.main_thread()
        return list(items)

    assert in_background(iter(range(50)), work) == list(range(50))
    assert in_background([], work) == []


def test_the_maker_waits_for_slow_work_and_what_is_done_is_freed():
    made, alive = 0, weakref.WeakSet()

    def items():
        nonlocal made
        for made in range(1, 31):
            item = torch.zeros(1)
            alive.add(item)
            yield item
            del item

    def work(items, at_stop):
        most = 0
        for count, _ in enumerate(items, 1):
            limit = count + ROOM + 1
            if count in (1, 10):
                wait(0.3, lambda limit=limit: made > limit)
            assert made <= limit
            most = max(most, len(alive))
        return most

    assert in_background(items(), work) <= ROOM + 3
    assert made == 30


def test_an_error_of_the_work_ends_the_making():
    made, error = [], ValueError("the disk is full")

    def items():
        for number in range(100):
            made.append(number)
            yield number

    def work(items, at_stop):
        next(items)
        raise error

    with pytest.raises(ValueError, match="the disk is full") as raised:
        in_background(items(), work)
    assert raised.value is error and len(made) <= ROOM + 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_maker_ends_the_work(error):
    seen, ended = [], threading.Event()

    def items():
        yield 1
        raise error

    def work(items, at_stop):
        at_stop(ended.set)
        with pytest.raises(StoppedError):
            seen.extend(items)
        assert ended.wait(10)

    with pytest.raises(error):
        in_background(items(), work)
    assert ended.is_set() and set(seen) <= {1}


@posix
def test_an_interrupt_ends_work_that_waits_for_something_else():
    ended, reached = threading.Event(), threading.Event()

    def work(items, at_stop):
        next(items)
        at_stop(ended.set)
        reached.set()
        assert ended.wait(30)

    with interrupted(once=reached.is_set):
        in_background(range(100), work)
    assert ended.is_set()


def test_an_interrupt_before_the_first_item_ends_the_second_thread(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "add_done_callback", interrupt)
    ended = []

    def run():
        with pytest.raises(KeyboardInterrupt):
            in_background(range(3), lambda items, at_stop: list(items))
        ended.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert ended


def chunks(num_chunks=8, size=(32, 48)):
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_chunks):
        yield torch.rand(1, 3, 5, *size, generator=generator)


@contextlib.contextmanager
def decoding(chunks):
    """Stands in for a VAE: twice as bright, around grey."""
    yield (chunk * 2 - 1 for chunk in chunks)


def test_a_video_is_the_same_file_as_on_one_thread(tmp_path):
    seen = []
    count = write_video(
        tmp_path / "two.mp4", chunks(), fps=16, decoding=decoding, on_frames=lambda run: seen.append(len(run))
    )
    assert count == 40 and seen == [5] * 8
    with decoding(chunks()) as pixels:
        write_video(tmp_path / "one.mp4", pixels, fps=16)
    assert (tmp_path / "two.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()


def test_no_chunk_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="film: there is no frame to write"):
        write_video(tmp_path / "film.mp4", [], fps=16, decoding=decoding)


@pytest.mark.parametrize("what", ["decoding", "the making", "ffmpeg"])
def test_an_error_leaves_no_file_and_no_ffmpeg(tmp_path, ffmpeg_that, what):
    def failing(chunks, error):
        for count, chunk in enumerate(chunks):
            if count == 4:
                raise error
            yield chunk

    @contextlib.contextmanager
    def broken(chunks):
        with decoding(chunks) as pixels:
            yield failing(pixels, RuntimeError("decoding"))

    if what == "ffmpeg":
        ffmpeg_that("head -c 20000 >/dev/null; kill -9 $$")
    source = failing(chunks(40), RuntimeError("the making")) if what == "the making" else chunks(40)
    with pytest.raises((RuntimeError, ValueError), match=what):
        write_video(tmp_path / "film.mp4", source, fps=16, decoding=broken if what == "decoding" else decoding)
    assert list(tmp_path.iterdir()) == []


@posix
def test_an_interrupt_ends_an_ffmpeg_that_takes_no_frames(tmp_path, ffmpeg_that):
    pid = tmp_path / "pid"
    ffmpeg_that(f'echo $$ >"{pid}"; exec sleep 60')
    began = time.monotonic()
    with interrupted(once=lambda: pid.exists() and pid.read_text()):
        write_video(tmp_path / "film.mp4", chunks(1000, (256, 256)), fps=16, decoding=decoding)
    assert time.monotonic() - began < 40 and list(tmp_path.iterdir()) == [pid]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_an_ffmpeg_that_takes_no_frames_stops_the_making(tmp_path, ffmpeg_that):
    """However long the video: no more frames wait than the queue, the chunk in work and the pipe hold."""
    made = 0

    def counted():
        nonlocal made
        for made, chunk in enumerate(chunks(1000, (256, 256)), 1):
            yield chunk

    ffmpeg_that(f'touch "{tmp_path}/begun"; while ! [ -e "{tmp_path}/go" ]; do sleep 0.05; done; exit 3')
    seen = []

    def watch():
        wait(30, (tmp_path / "begun").exists)
        wait(0.5, lambda: made > ROOM + 3)
        seen.append(made)
        (tmp_path / "go").touch()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(ValueError, match="exit status 3"):
        write_video(tmp_path / "film.mp4", counted(), fps=16, decoding=decoding)
    watcher.join()
    assert 0 < seen[0] <= ROOM + 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_the_decoder_has_a_stream_of_its_own_and_draws_the_same(tmp_path):
    pipeline = Pipeline.load(StudentSource().open(), torch.device("cuda"), torch.bfloat16)
    latents = torch.randn(1, 16, 12, 8, 16, generator=torch.Generator().manual_seed(0)).split(3, dim=2)
    busy = torch.randn(2048, 2048, device="cuda")

    def made():
        for chunk in latents:
            for _ in range(50):
                busy.copy_(busy @ busy / 2048)
            yield chunk

    streams = []
    with torch.inference_mode():
        write_video(
            tmp_path / "two.mp4", made(), fps=16, decoding=pipeline.decoding,
            on_frames=lambda _: streams.append(torch.cuda.current_stream()),
        )  # fmt: skip
    write_video(tmp_path / "one.mp4", pipeline.decode(latents), fps=16)
    assert torch.cuda.default_stream() not in streams and len(set(streams)) == 1
    assert (tmp_path / "two.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()
