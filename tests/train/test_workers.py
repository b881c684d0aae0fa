"""`evaluate` and `encode` on workers make what they make in one process, also where a worker is killed."""

import dataclasses
import multiprocessing
import os
import signal

import pytest
import torch

from context_forcing.train.data import encode
from context_forcing.train.data.encode import EncodeSettings, SetEncoder
from context_forcing.train.data.encode_jobs import SetEncoderOnWorkers
from context_forcing.train.data.manifest import read_manifest
from context_forcing.train.data.parts import PROMPTS
from context_forcing.train.data.shards import EncodedSet, ShardWriter
from context_forcing.train.evaluation.evaluate import Plan, Results, evaluate, parse_students
from context_forcing.train.evaluation.rollout import Camera
from context_forcing.workers import local
from context_forcing.workers.engine import Engine
from context_forcing.workers.local import LocalWorkers

from ..workers.here import Here
from .videos import SETTINGS, contents, film, run, world_frames


@pytest.fixture
def one_thread(monkeypatch):
    """Rounding depends on the number of threads."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forked(monkeypatch, one_thread, tmp_path):
    """Workers are forked, so that they begin at once and have what a test has patched.

    (class, method, when) -> the process that calls the method with arguments for which `when` holds kills itself,
    once. A generator kills it after its first value.
    """
    if os.name == "nt":
        pytest.skip("signals of POSIX")
    monkeypatch.setattr(
        local, "multiprocessing", type("", (), {"get_context": lambda way: multiprocessing.get_context("fork")})
    )

    def kill_in(owner, name, when):
        true, done, here = getattr(owner, name), tmp_path / "killed", os.getpid()

        def call(*arguments):
            result = true(*arguments)
            if os.getpid() == here or done.exists() or not when(*arguments):
                return result
            if hasattr(result, "__next__"):
                next(result)
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(owner, name, call)
        return done

    return kill_in


@pytest.fixture
def plan(students):
    students = parse_students(students[0], [f"{students[1]}=none"], "novel")
    return Plan(students=students, gaps=(0,), columns=(9,), rollouts=2, minutes=0.4, long_rollouts=2)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def encode_on(workers, source, output, settings=SETTINGS, retries=2, shard_bytes=60_000, on_clip=None):
    """Encode on workers, in small shards as tests.train.videos.run. `on_clip` gets the encoder and what `run` gives."""
    with Engine(workers, retries) as engine:
        encoder = SetEncoderOnWorkers(source, output, settings, engine)
        encoder.writer.shard_bytes = shard_bytes
        encoder.run(lambda num_sources: on_clip and on_clip(encoder, num_sources))
    assert not list(output.glob("workers-*")), "nothing is left of the sets of single sources"
    return encoder, engine


def here(workers):
    """A way to encode, on so many workers without processes; 0: in one process."""
    return (lambda *given: encode_on(Here(workers), *given)[0]) if workers else run


class SlowFirst(Here):
    """The first video never ends: Ctrl-C comes when all others have ended."""

    def wait(self, seconds):
        if [job.name for job in self.running.values()] == ["a.mp4"]:
            raise KeyboardInterrupt
        return super().wait(seconds)


@pytest.fixture
def encoded(monkeypatch):
    """A list that gets an item for each clip that a VAE encodes, and for each prompt."""
    calls, latents, text = [], encode.Encoder.latents, encode.encode_demo_text
    monkeypatch.setattr(encode.Encoder, "latents", lambda *given: (calls.append("clip"), latents(*given))[1])
    monkeypatch.setattr(encode, "encode_demo_text", lambda prompt: (calls.append(prompt), text(prompt))[1])
    return calls


@pytest.mark.slow
def test_two_workers_finish_the_results_of_one_process_also_if_one_is_killed(plan, tmp_path, monkeypatch, forked):
    tables = evaluate(plan, "cpu", "fp32", tmp_path / "here")
    add = Results.add

    def stop_after_two(results, records):
        add(results, records)
        if len({(each.student, each.policy, each.scene) for each in results.records}) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Results, "add", stop_after_two)
        evaluate(plan, "cpu", "fp32", tmp_path / "there")
    killed = forked(Camera, "move", lambda camera, memory, move: len(memory.latent_chunks) == 2)
    with Engine(LocalWorkers(2, "cpu")) as engine:
        there = evaluate(plan, "cpu", "fp32", tmp_path / "there", engine)
    assert killed.exists() and engine.lost_workers == 1
    assert engine.num_ended == engine.total == 6, "what is there is not made again"
    assert [table.row_count for table in there] == [table.row_count for table in tables]
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")


def test_two_workers_encode_the_set_of_one_process_also_if_one_is_killed(whole_videos, tmp_path, forked):
    run(whole_videos, tmp_path / "here")
    killed = forked(SetEncoder, "encode", lambda encoder, source: source.name == "b.mp4")
    encoder, engine = encode_on(LocalWorkers(2, "cpu"), whole_videos, tmp_path / "there")
    assert killed.exists() and engine.lost_workers == 1 and encoder.new_clips == 6
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_limited_set_goes_on_with_another_number_of_workers(whole_videos, tmp_path, one_thread):
    """Two clips end with a video, four in the middle of one."""
    on_workers = lambda *given: encode_on(Here(3), *given)[0]
    for count, way in ((2, on_workers), (3, run), (4, on_workers), (None, on_workers)):
        limited = EncodeSettings(frames=4, max_clips=count)
        sets = [tmp_path / "mixed", tmp_path / "alone"]
        encoders = [way(whole_videos, sets[0], limited), run(whole_videos, sets[1], limited)]
        assert [encoder.num_clips for encoder in encoders] == [count or 6] * 2
        assert encoders[0].finished == encoders[1].finished
        assert contents(sets[0]) == contents(sets[1])


def test_what_is_wrong_with_a_file_is_reported_by_workers_too(videos, tmp_path, one_thread):
    good = (videos / "b.mp4").read_bytes()
    (videos / "cut.mp4").write_bytes(good[: len(good) * 2 // 3])
    (videos / "cut.txt").write_text("A meadow.")
    film(videos / "short.mp4", world_frames(5, 12))
    film(videos / "mute.mp4", world_frames(5, 13), caption=None)
    run(videos, tmp_path / "here")
    encoder, _ = encode_on(Here(2), videos, tmp_path / "there")
    assert encoder.skipped.keys() == {"cut.mp4", "short.mp4", "mute.mp4"} and encoder.num_clips == 6
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    (videos / "mute.txt").write_text("A meadow.")
    assert encode_on(Here(2), videos, tmp_path / "there")[0].new_clips == 0, "skipped stays skipped"
    retry = dataclasses.replace(SETTINGS, retry=True)
    assert encode_on(Here(2), videos, tmp_path / "there", retry)[0].new_clips == 1


def test_a_video_in_which_every_worker_dies_is_skipped_with_the_reason(whole_videos, tmp_path, one_thread):
    (tmp_path / "set" / "workers-left").mkdir(parents=True)
    encoder, engine = encode_on(Here(2, **{"b.mp4": 9}), whole_videos, tmp_path / "set", retries=1)
    assert engine.lost_workers == 2 and encoder.finished == {"a.mp4": 2, "sub/c.mp4": 1}
    assert encoder.skipped == {"b.mp4": "its worker died 2 times, the last ended by SIGKILL"}
    retried = dataclasses.replace(SETTINGS, retry=True)
    assert encode_on(Here(2), whole_videos, tmp_path / "set", retried)[0].num_clips == 6


def test_prompts_are_encoded_some_at_a_time(tmp_path, one_thread):
    prompts, count = tmp_path / "prompts.txt", PROMPTS + 8
    prompts.write_text("\n".join(f"A meadow by day, number {number}." for number in range(count)))
    settings = EncodeSettings(negative_prompt="snow at night")
    run(prompts, tmp_path / "here", settings)
    workers = Here(2)
    encoder, _ = encode_on(workers, prompts, tmp_path / "there", settings)
    assert contents(tmp_path / "there") == contents(tmp_path / "here") and encoder.num_clips == count
    assert len(workers.begun) == 3, "one of them is for the texts beside the clips"
    assert EncodedSet(tmp_path / "there", 0).negative("snow at night").shape[1] == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_what_workers_finished_before_ctrl_c_is_not_encoded_again(whole_videos, tmp_path, one_thread, encoded, workers):
    with pytest.raises(KeyboardInterrupt):
        encode_on(SlowFirst(3), whole_videos, tmp_path / "there")
    assert encoded.count("clip") == 4 and len(list((tmp_path / "there").glob("workers-*"))) == 2
    assert here(workers)(whole_videos, tmp_path / "there").new_clips == 6
    assert encoded.count("clip") == 6 and not list((tmp_path / "there").glob("workers-*"))
    run(whole_videos, tmp_path / "here")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_video_that_fails_ends_the_command_and_nothing_else(whole_videos, tmp_path, one_thread, encoded, monkeypatch):
    with monkeypatch.context() as patch:
        check = encode.check_video

        def killed(video, *part):
            if video.name == "b.mp4":
                raise ValueError("b.mp4: ffmpeg was ended by signal 9; run it again")
            check(video, *part)

        patch.setattr(encode, "check_video", killed)
        with pytest.raises(ValueError, match="^b.mp4: ffmpeg was ended by signal 9"):
            encode_on(Here(3), whole_videos, tmp_path / "there")
    assert encoded.count("clip") == 3 and len(list((tmp_path / "there").glob("workers-*"))) == 2
    assert len(EncodedSet(tmp_path / "there", 0).entries) == 2, "training reads what is in the set"
    encoder, _ = encode_on(Here(2), whole_videos, tmp_path / "there")
    assert encoded.count("clip") == 6 and encoder.new_clips == 4, "the set had the first video"
    run(whole_videos, tmp_path / "here")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.parametrize(("source", "clips", "workers"), [(0, 1, 2), (1, 4, 0), (2, 5, 0), (2, 5, 3)])
@pytest.mark.parametrize("way", ["kill", "Ctrl-C"])
def test_clips_stay_with_the_workers_until_a_shard_has_them(
    whole_videos, tmp_path, one_thread, encoded, source, clips, workers, way
):
    """An end when so many clips are taken. A kill: none is in a shard; all are; the last of a finished video is not."""

    def interrupt(encoder, number):
        if (number, encoder.num_clips) == (source, clips):
            if way == "kill":
                encoder.writer.flush = lambda: None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_on(Here(3), whole_videos, tmp_path / "there", on_clip=interrupt)
    assert encoded.count("clip") == 6
    for most in (5, None):
        settings = dataclasses.replace(SETTINGS, max_clips=most)
        assert here(workers)(whole_videos, tmp_path / "there", settings).num_clips == (most or 6)
        assert most is None or encoded.count("clip") == 6, "nothing is encoded again"
        run(whole_videos, tmp_path / "here", settings)
        assert contents(tmp_path / "there") == contents(tmp_path / "here")
        encoded.clear()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_video_that_ends_at_the_limit_is_finished_also_after_ctrl_c(
    whole_videos, tmp_path, one_thread, monkeypatch, workers
):
    """Ctrl-C between its last clip and the line that it is finished."""
    limited, finish = dataclasses.replace(SETTINGS, max_clips=2), ShardWriter.finish

    def interrupt(writer, source, count):
        if source == "a.mp4":
            raise KeyboardInterrupt
        finish(writer, source, count)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardWriter, "finish", interrupt)
        encode_on(Here(1), whole_videos, tmp_path / "there", limited)
    assert here(workers)(whole_videos, tmp_path / "there", limited).finished == {"a.mp4": 2}
    run(whole_videos, tmp_path / "here", limited)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_what_cannot_be_continued_is_made_again(videos, tmp_path, one_thread, encoded, caplog):
    """Of the two videos that workers finished one has another caption now, and a file of the other is cut short."""
    with pytest.raises(KeyboardInterrupt):
        encode_on(SlowFirst(3), videos, tmp_path / "there")
    longest = max((tmp_path / "there").glob("workers-*"), key=lambda folder: len(list(folder.glob("shard-*"))))
    (longest / "shard-00001.safetensors").write_bytes(b"")
    (videos / "sub/c.txt").write_text("Snow at night.")
    encode_on(Here(3), videos, tmp_path / "there")
    assert encoded.count("clip") == 4 + 6
    assert "shard-00001.safetensors: not a whole safetensors file" in caplog.text
    assert "what workers left of b.mp4 is made again" in caplog.text
    run(videos, tmp_path / "here")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.parametrize("workers", [0, 2])
def test_prompts_that_workers_finished_are_not_encoded_again(tmp_path, one_thread, encoded, workers):
    """Ctrl-C in the middle of a part, after the set has some of it in shards."""
    prompts, texts = tmp_path / "prompts.txt", [f"A meadow by day, number {number}." for number in range(PROMPTS + 8)]
    prompts.write_text("\n".join(texts))
    small = 10 * SETTINGS.frames * 4096

    def interrupt(encoder, number):
        if number == PROMPTS // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_on(Here(3), prompts, tmp_path / "there", shard_bytes=small, on_clip=interrupt)
    assert len(read_manifest(tmp_path / "there").entries) == PROMPTS // 2
    assert sorted(filter(None, encoded)) == sorted(texts)
    if workers:
        encode_on(Here(workers), prompts, tmp_path / "there", shard_bytes=small)
    else:
        run(prompts, tmp_path / "there", shard_bytes=small)
    assert sorted(filter(None, encoded)) == sorted(texts)
    run(prompts, tmp_path / "here", shard_bytes=small)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_mistake_is_that_of_one_process(whole_videos, tmp_path):
    settings = dataclasses.replace(SETTINGS, model=str(tmp_path / "wan"))
    with pytest.raises(ValueError, match="model: .*wan has no folder vae"):
        encode_on(Here(2), whole_videos, tmp_path / "set", settings)
    assert not (tmp_path / "set").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_results_of_gpus_are_judged_where_a_gpu_is(plan, tmp_path):
    workers = Here(2)
    workers.device = "cuda"
    with pytest.raises(ValueError, match="^--ray: the workers have GPUs, this machine, which judges, has none"):
        evaluate(plan, "auto", "auto", tmp_path, Engine(workers))
    assert not workers.begun and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_on_a_ray_cluster(plan, whole_videos, tmp_path, one_thread):
    pytest.importorskip("ray", reason="pip install ray; CONTRIBUTING.md, Tests")
    from context_forcing.workers.ray_workers import RayWorkers

    short = dataclasses.replace(plan, minutes=0.0)
    evaluate(short, "cpu", "fp32", tmp_path / "evaluated")
    run(whole_videos, tmp_path / "encoded")
    with Engine(RayWorkers("local", 2, "cpu")) as engine:
        evaluate(short, "cpu", "fp32", tmp_path / "evaluated there", engine)
        assert files_of(tmp_path / "evaluated there") == files_of(tmp_path / "evaluated")
        encode_on(engine.workers, whole_videos, tmp_path / "encoded there")
    assert contents(tmp_path / "encoded there") == contents(tmp_path / "encoded")
