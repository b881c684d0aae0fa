"""A jobs file is read whole and checked before a video is begun."""

import re

import pytest
import yaml

from context_forcing.video.jobs import OPTIONS, parse_jobs, read_jobs

STORY = "seed: 4\nsegments:\n  - {prompt: A meadow by day., seconds: 2}\n"
PLAIN = {"output": "out/{story}-{seed}.mp4", "stories": ["a.yaml"]}


@pytest.fixture
def jobs_of(tmp_path):
    """(values) -> the videos of a jobs file beside a.yaml, b.yaml and more/a.yaml."""
    (tmp_path / "more").mkdir()
    for name in ("a.yaml", "b.yaml", "more/a.yaml"):
        (tmp_path / name).write_text(STORY)

    def jobs_of(**values):
        (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(PLAIN | values))
        return read_jobs(tmp_path / "jobs.yaml")

    return jobs_of


def test_every_story_is_made_with_every_seed_and_student(jobs_of, tmp_path):
    students = ["demo", {"name": "short", "set": ["steps=1000"]}]
    output = "{student}/{story}-{seed}-{number:02d}.mp4"
    jobs = jobs_of(output=output, stories=["a.yaml", "b.yaml"], seeds=[7, 8], students=students)
    names = [str(job.output.relative_to(tmp_path)) for job in jobs]
    assert names[:3] == ["demo/a-7-01.mp4", "demo/a-8-02.mp4", "demo/b-7-03.mp4"]
    assert names[4:] == [f"short/{name}.mp4" for name in ("a-7-05", "a-8-06", "b-7-07", "b-8-08")]
    assert [job.request.seed for job in jobs] == [7, 8] * 4
    assert {job.request.student.overrides for job in jobs} == {(), ("steps=1000",)}
    assert {(job.num_chunks, job.is_made) for job in jobs} == {(3, False)}
    assert not list(tmp_path.rglob("*.mp4*")) and not (tmp_path / "demo").exists()


def test_options_of_generate_reach_every_video(jobs_of, tmp_path):
    (job,) = jobs_of(options={"slow": 3, "threshold": 1, "commit_attends": "itself", "scale": 2, "start": "first.png"})
    assert job.request.settings == {"slow": 3, "slow_similarity_threshold": 1}
    assert (job.request.commit_attends, job.request.scale) == ("itself", 2)
    (tmp_path / "taew2_1.pth").touch()
    (tiny,) = jobs_of(options={"decoder": "taew2_1.pth"})
    assert tiny.request.decoder == str(tmp_path / "taew2_1.pth")
    assert job.request.start == tmp_path / "first.png" and job.output == tmp_path / "out" / "a-4.mp4"


def test_what_differs_between_videos_is_no_option():
    assert not {"story", "output", "seed", "resume", "report", "memory_out", "device"} & set(OPTIONS)
    assert {"dtype", "attention", "kv_placement", "offload", "policy"} <= set(OPTIONS)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"output": None}, "output: None"),
        ({"output": "{story}.gif"}, "does not end in .mp4"),
        ({"output": "{name}.mp4"}, "{name} is not one of {story}, {student}, {seed}, {number}"),
        ({"output": "{seed.real}.mp4"}, "{seed.real} is not one of"),
        ({"output": "{story.mp4"}, "output: '{story.mp4'"),
        ({"stories": []}, "stories: () is not a list with at least one entry"),
        ({"stories": "a.yaml"}, "stories: 'a.yaml' is not a list"),
        ({"stories": [3]}, "stories[0]: 3"),
        ({"stories": ["none.yaml"]}, "none.yaml: cannot be read"),
        ({"stories": ["a.yaml", "more/a.yaml"]}, "is the name of two videos"),
        ({"seeds": [1, -1]}, "seeds[1]: -1"),
        ({"seeds": [True]}, "seeds[0]: True"),
        ({"students": ["none.pt"]}, "students[0]: --student: no such file"),
        ({"students": [{"card": 3}]}, "students[0].card: 3 is not text"),
        ({"students": [{"set": "shift=3"}]}, "students[0].set: 'shift=3' is not a list of texts"),
        ({"students": [{"path": "x"}]}, "students[0].path: unknown key"),
        ({"students": [{"set": ["shift=x"]}]}, "students[0]:"),
        ({"options": {"seed": 3}}, "options.seed: unknown option"),
        ({"options": {"slow": "3"}}, "options.slow: '3' is not a whole number"),
        ({"options": {"offload": 1}}, "options.offload: 1 is not true or false"),
        ({"options": {"threshold": float("nan")}}, "options.threshold: nan is not a number"),
        ({"options": {"scale": 65}}, "options.scale: 65 is not from 1 to 64"),
        ({"options": {"dtype": "fp8"}}, "dtype: 'fp8'"),
        ({"options": {"dtype": "fp16"}}, "dtype: 'fp16' is not one of bf16, fp32"),
        ({"options": {"attention": "foo"}}, "attention: 'foo' is not one of sdpa, flash"),
        ({"options": {"kv_placement": "far"}}, "kv_placement: 'far'"),
        ({"options": {"memory": "elephant"}}, "memory: 'elephant'"),
        ({"options": {"slow": -1}}, "slow: -1"),
        ({"option": {}}, "option: unknown key"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line(jobs_of, values, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        jobs_of(**values)
    assert "\n" not in str(error.value) and "jobs.yaml: " in str(error.value)


def test_other_texts_are_refused(tmp_path):
    for raw, words in ((None, "is empty"), ([], "is not a mapping"), ("text", "is not a mapping")):
        with pytest.raises(ValueError, match=words):
            parse_jobs(raw)
    (tmp_path / "jobs.yaml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_jobs(tmp_path / "jobs.yaml")
    with pytest.raises(ValueError, match="none.yaml: cannot be read"):
        read_jobs(tmp_path / "none.yaml")
