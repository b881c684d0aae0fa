"""Evaluation as a whole: scripts share their beginnings, rollouts are paired, and a killed run goes on."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from context_forcing.cli import app
from context_forcing.memory.history import reach_frames
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.train.evaluation import evaluate as command
from context_forcing.train.evaluation.evaluate import Plan, evaluate, long_paths, parse_students
from context_forcing.train.evaluation.judge import QUARTERS, LongTrial, Trial, World, judge
from context_forcing.train.evaluation.rollout import Camera, branches
from context_forcing.train.evaluation.scenes import SceneJob
from context_forcing.train.evaluation.summary import (
    GROWTH,
    Record,
    bootstrap,
    effective_context,
    shuffled_rate,
    sum_up,
    tables,
)
from context_forcing.train.world.camera import headings, render_latent_frames
from context_forcing.train.world.prompts import ALL_STYLES
from context_forcing.train.world.scene import Scene
from context_forcing.train.world.scripts import benchmark_script
from context_forcing.video.pipeline import Pipeline
from context_forcing.workers.job import Loaded

from .helpers import generated


@pytest.fixture(scope="module")
def world():
    return World(Pipeline.load(StudentSource().open(), torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("policy", ["novel", "fifo"])
def test_branches_equal_separate_rollouts(pipeline, same_memory, policy):
    style, seed = ALL_STYLES[3], 7
    scripts = {(kind, gap): benchmark_script(kind, gap, True) for kind in ("dwell", "wander") for gap in (0, 4)}
    empty = pipeline.empty_memory(policy=policy)
    ends = dict(branches(Camera(pipeline, style, seed), empty, {key: s.moves for key, s in scripts.items()}))
    assert set(ends) == set(scripts)
    for key, script in scripts.items():
        assert same_memory(ends[key], generated(pipeline, empty, style, seed, script.moves)), key


def test_a_shared_beginning_is_made_once(pipeline):
    moves = []

    class Counting(Camera):
        def move(self, memory, move):
            moves.append(move)
            return memory

    paths = {"a": (0, 1, 1), "b": (0, 1, -1, -1), "c": (0, 1), "same as c": (0, 1)}
    ends = list(branches(Counting(pipeline, ALL_STYLES[0], 0), pipeline.empty_memory(), paths))
    assert sorted(name for name, _ in ends) == sorted(paths)
    assert len(moves) == 2 + 1 + 2


def record(student="one", policy="novel", scene=0, kind="dwell", columns=9, gap=15, recall=1.0, targets=4, **given):
    """A trial with a given share of targets recalled."""
    remembered = tuple(range(targets))
    hits = round(recall * targets)
    returned = remembered[:hits] + tuple(20 + target for target in remembered[hits:])
    trial = dict(
        first=remembered, remembered=remembered, returned=returned, whole=(True,) * targets, psnr=20.0,
        heading_accuracy=1.0, motion=1.0, change=1.0, residual=0.0,
    )  # fmt: skip
    return Record(
        student=student,
        policy=policy,
        seed=0,
        scene=scene,
        kind=kind,
        columns=columns,
        gap_frames=gap,
        trial=Trial(**{**trial, **given}),
    )


def test_a_world_that_changed_meanwhile_scores_chance(world):
    script, style = benchmark_script("dwell", 4, False), ALL_STYLES[0]
    records = []
    for k in range(20):
        art = [
            render_latent_frames(
                Scene.sample(np.random.default_rng(seed)), [style] * len(script.moves), script.moves, start=7 * k
            )
            for seed in (k, 1000 + k)
        ]
        film, other = (world.encode(each).movedim(0, 1) for each in art)
        film[:, script.return_frame :] = other[:, script.return_frame :]
        trial = judge(world, film, script, style)
        records.append(dataclasses.replace(record(scene=k), trial=trial))
    (cell,) = sum_up(records).cells
    recall = cell.figures["recall"]
    assert recall.mean < 0.2 and recall.low <= recall.mean <= recall.high
    assert cell.shuffled < 0.2 and cell.n == 20


def test_a_collapsed_world_is_told_by_the_shuffled_rate():
    trials = [record(scene=k).trial for k in range(5)]
    assert shuffled_rate(trials) == 1 == np.mean([trial.recall for trial in trials])


def test_the_shuffled_rate_is_that_of_all_pairs_of_other_rollouts():
    rng = np.random.default_rng(0)
    trials = []
    for k in range(9):
        before, after = (tuple(int(c) for c in rng.integers(3, size=2 + k % 2)) for _ in range(2))
        trials.append(dataclasses.replace(record().trial, remembered=before, returned=after))
    pairs = itertools.permutations(trials, 2)
    expected = np.mean([a == b for one, two in pairs for a, b in zip(one.remembered, two.returned)])
    assert shuffled_rate(trials) == pytest.approx(expected)


def test_the_interval_covers_the_mean_and_narrows():
    draws = np.random.default_rng(3).random(100)
    few, many = bootstrap(draws[:10]), bootstrap(draws)
    assert few.low < few.mean < few.high and many.mean == pytest.approx(draws.mean())
    assert many.high - many.low < few.high - few.low
    # Two standard errors on either side of the mean.
    assert many.high - many.mean == pytest.approx(1.96 * draws.std() / 10, rel=0.1)
    assert bootstrap([0.5] * 3) == dataclasses.replace(bootstrap([0.5] * 7), n=3)


def test_differences_are_paired_by_scene():
    """The scenes differ far more than the students do; only pairs can tell them apart."""
    recalls = [0.0, 0.25, 0.5, 0.75] * 4
    one = [record(scene=k, recall=recall) for k, recall in enumerate(recalls)]
    two = [record(student="two", scene=k, recall=recall + 0.25) for k, recall in enumerate(recalls)]
    summary = sum_up(one + two[::-1])
    (difference,) = summary.differences
    assert (difference.student, difference.against, difference.n) == ("two", ("one", "novel"), 16)
    figure = difference.figures["recall"]
    assert figure.mean == pytest.approx(0.25) and figure.high - figure.low < 1e-9
    first, second = (cell.figures["recall"] for cell in summary.cells)
    assert first.high > second.low


def test_differences_leave_out_scenes_that_only_one_has():
    one = [record(scene=k, recall=0.5) for k in range(4)]
    two = [record(student="two", scene=k, recall=1.0) for k in range(2, 9)]
    (difference,) = sum_up(one + two).differences
    assert difference.n == 2 and difference.figures["recall"].mean == 0.5


def test_what_is_held_against_what():
    records = [
        record(student=student, policy=policy, scene=k)
        for k in range(2)
        for student, policy in (("one", "novel"), ("one", "none"), ("two", "novel"), ("two", "none"), ("three", "fifo"))
    ]
    assert [(each.student, each.policy, each.against) for each in sum_up(records).differences] == [
        ("one", "none", ("one", "novel")),
        ("two", "novel", ("one", "novel")),
        ("two", "none", ("one", "novel")),
        ("two", "none", ("one", "none")),
        ("three", "fifo", ("one", "novel")),
    ]


@pytest.mark.parametrize(
    "recalls, frames, is_bound, again",
    [
        ({15: 1.0, 27: 0.75, 75: 0.5}, 15, False, None),
        ({15: 1.0, 27: 1.0, 75: 1.0}, 75, True, None),
        ({15: 0.5, 27: 0.5}, 0, False, None),
        ({15: 0.5, 27: 1.0, 75: 0.5}, 0, False, 27),
        ({75: 1.0, 15: 1.0, 27: 0.5}, 15, False, 75),
    ],
    ids=["fails late", "never fails", "fails at once", "fails, then holds", "in any order"],
)
def test_effective_context_stops_at_the_first_gap_that_is_not_bridged(recalls, frames, is_bound, again):
    cells = sum_up([record(scene=k, gap=gap, recall=recalls[gap]) for gap in recalls for k in range(2)]).cells
    context = effective_context("one", "novel", "dwell", 9, "recall", cells)
    assert (context.frames, context.is_bound, context.again) == (frames, is_bound, again)


def test_every_length_of_trip_has_its_own_effective_context():
    recalls = {(9, 15): 1.0, (9, 27): 1.0, (18, 33): 1.0, (18, 45): 0.5, (27, 51): 0.0}
    records = [
        record(scene=k, columns=columns, gap=gap, recall=recall)
        for (columns, gap), recall in recalls.items()
        for k in range(2)
    ]
    summary = sum_up(records)
    contexts = [each for each in summary.effective_context if each.figure == "recall"]
    assert [(each.columns, each.frames, each.is_bound) for each in contexts] == [
        (9, 27, True),
        (18, 33, False),
        (27, 0, False),
    ]
    cells, effective = tables(summary, fps=16)
    assert cells.row_count == 5 and effective.row_count == 3
    assert list(cells.columns[1].cells) == ["9", "9", "18", "18", "27"]


def test_recall_of_whole_landmarks_skips_rollouts_without_one():
    """Recall is 1/2; of the whole ones it is 1, or 0, or there is none."""
    whole = [(True, True, False, False), (False, False, True, True), (False,) * 4]
    one = [record(scene=k, recall=0.5, whole=each) for k, each in enumerate(whole)]
    two = [record(student="two", scene=k, recall=1.0, whole=each) for k, each in enumerate(whole)]
    summary = sum_up(one + two)
    recall = summary.cells[0].figures["recall_whole"]
    assert (recall.mean, recall.n, summary.cells[0].n) == (0.5, 2, 3)
    assert summary.cells[0].figures["share_whole"].mean == pytest.approx(1 / 3)
    (difference,) = summary.differences
    assert difference.figures["recall"].n == 3
    assert (difference.figures["recall_whole"].mean, difference.figures["recall_whole"].n) == (0.5, 2)

    none = sum_up([record(scene=k, whole=(False,) * 4) for k in range(2)])
    assert "recall_whole" not in none.cells[0].figures
    table = tables(none, fps=16)[0]
    shown = {column.header: list(column.cells) for column in table.columns}
    assert shown["recall of whole [95 %]"] == shown["n whole"] == [""]
    assert shown["recall [95 %]"] != [""] and shown["motion"] == ["1.00"]


def test_a_record_survives_json():
    long = LongTrial(**dict.fromkeys(LongTrial.__dataclass_fields__, (1.0, 2.0, 3.0, 4.0)))
    for each in (record(), dataclasses.replace(record(), kind="long", columns=0, gap_frames=0, trial=long)):
        assert Record.from_dict(json.loads(json.dumps(dataclasses.asdict(each)))) == each


def test_long_rollouts_are_summed_up_by_quarter():
    def long(student, scene, palette):
        fields = dict.fromkeys(LongTrial.__dataclass_fields__, (1.0,) * QUARTERS)
        trial = LongTrial(**{**fields, "palette": palette})
        return dataclasses.replace(record(student, scene=scene), kind="long", columns=0, gap_frames=0, trial=trial)

    records = [long("one", k, (0.1, 0.1, 0.1, 0.1)) for k in range(3)]
    records += [long("two", k, (0.1, 0.2, 0.3, 0.4)) for k in range(3)]
    summary = sum_up(records)
    ats = (1, 2, 3, 4, GROWTH)
    assert [(cell.at, cell.student) for cell in summary.cells] == [(at, s) for at in ats for s in ("one", "two")]
    drift = [each.figures["palette"].mean for each in summary.differences]
    assert drift == pytest.approx([0, 0.1, 0.2, 0.3, 0.3]) and summary.effective_context == ()
    growth = [cell.figures["palette"].mean for cell in summary.cells if cell.at == GROWTH]
    assert growth == pytest.approx([0, 0.3])
    (table,) = tables(summary, fps=16)
    assert [each for each in table.columns[0].cells if each] == ["1", "2", "3", "4", "growth"]


def test_long_paths_are_the_same_for_all_and_move_in_every_quarter():
    plan = Plan(students=(), minutes=2, seeds=(0, 5), long_rollouts=3)
    paths = long_paths(plan, fps=16)
    assert paths == long_paths(plan, fps=16) and len(paths) == 6 and len({tuple(path) for path in paths.values()}) == 6
    for path in paths.values():
        assert len(headings(path)) == 2 * 60 * 16 / 4
        assert all(any(quarter) for quarter in np.split(np.array(path), QUARTERS))
    with pytest.raises(ValueError, match="minutes.*0.4 is the least"):
        long_paths(Plan(students=(), minutes=0.3), fps=16)


def test_reach_is_the_age_of_the_oldest_frame_that_is_not_sink(pipeline):
    camera, memory = Camera(pipeline, ALL_STYLES[0], 0), pipeline.empty_memory(slow=0)
    reached = [reach_frames(memory := camera.move(memory, 0)) for _ in range(4)]
    assert reached == [0, 2, 2, 2]
    with_slow = pipeline.empty_memory(policy="fifo")
    for _ in range(5):
        with_slow = camera.move(with_slow, 0)
    assert reach_frames(with_slow) == 14 - min(with_slow.slots.slow)


def test_students_are_named_as_shortly_as_they_can_be_told_apart():
    students = parse_students("demo", ["runs/a/student.safetensors", "runs/b/student.safetensors=none"], "novel, none")
    assert [(each.name, each.policies) for each in students] == [
        ("demo", ("novel", "none")),
        ("a/student", ("novel", "none")),
        ("b/student", ("none",)),
    ]
    assert parse_students("x/demo.safetensors", ["demo"], "none")[0].name == "x/demo"
    assert parse_students("demo", ["demo=fifo"], "novel")[1].name == "demo"


@pytest.mark.parametrize(
    "compare, match",
    [(["demo"], "demo with policy 'novel' is listed twice"), (["a.pt", "./a.pt=none"], "listed twice")],
)
def test_a_student_named_twice_is_refused(compare, match):
    with pytest.raises(ValueError, match=match):
        parse_students("demo", compare, "novel")


@pytest.mark.parametrize(
    "given, match",
    [
        ({"gaps": ()}, "gaps"),
        ({"gaps": (8, 8)}, "gaps"),
        ({"columns": ()}, "columns"),
        ({"columns": (9, 9)}, "columns"),
        ({"columns": (10,)}, "columns: 10 is not one of 9, 12, .*, 33"),
        ({"seeds": ()}, "seed"),
        ({"rollouts": 1}, "rollouts: 1"),
        ({"minutes": -1.0}, "minutes: -1"),
        ({"minutes": 1.0, "long_rollouts": 1}, "long_rollouts: 1"),
    ],
)
def test_plans_that_make_no_sense_are_refused(given, match):
    with pytest.raises(ValueError, match=match):
        Plan(students=(), **given)


def test_the_command_line_says_what_is_measured(monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr(command, "evaluate", lambda plan, *where: plans.append(plan) or [])
    run = CliRunner().invoke
    assert run(app, ["evaluate", "-o", str(tmp_path)]).exit_code == 0
    options = "--policies novel,none --rollouts 3 --gaps 4 --columns 12 --seed 1,2 --minutes 2".split()
    options += ["--compare", "a.safetensors=none"]
    assert run(app, ["evaluate", "-o", str(tmp_path), *options]).exit_code == 0
    by_default, chosen = plans
    assert by_default == Plan(students=parse_students("demo", [], "recall,novel,none"))
    assert [each.policies for each in chosen.students] == [("novel", "none"), ("none",)]
    assert (chosen.rollouts, chosen.gaps, chosen.columns) == (3, (4,), (12,))
    assert (chosen.seeds, chosen.minutes) == ((1, 2), 2)
    refused = run(app, ["evaluate", "-o", str(tmp_path), "--gaps", "4,x"])
    assert isinstance(refused.exception, ValueError) and "gaps: 'x' is not a whole number" in str(refused.exception)


@pytest.fixture
def plan(students):
    return Plan(
        students=parse_students(students[0], [f"{students[1]}=none"], "oracle"), gaps=(0,), columns=(9,), rollouts=2,
        minutes=0.4, long_rollouts=2,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_results(plan, tmp_path, monkeypatch):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    tables = evaluate(plan, "cpu", "fp32", whole)
    assert [table.row_count for table in tables] == [4, 4, 2 * GROWTH]

    add, added = command.Results.add, []

    def killed(self, records):
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(records)
        add(self, records)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command.Results, "add", killed)
        evaluate(plan, "cpu", "fp32", halved)
    kept = json.loads((halved / "recall.json").read_text())
    assert 0 < len(kept["records"]) < len(json.loads((whole / "recall.json").read_text())["records"])

    evaluate(plan, "cpu", "fp32", halved)
    assert (halved / "recall.json").read_bytes() == (whole / "recall.json").read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(Camera, "move", None)
        evaluate(plan, "cpu", "fp32", halved)
    for name, other in (("gaps", (0, 4)), ("columns", (9, 12))):
        with pytest.raises(ValueError, match=f"output: .*recall.json was made with other {name}; give another folder"):
            evaluate(dataclasses.replace(plan, **{name: other}), "cpu", "fp32", halved)


@pytest.mark.slow
def test_results_plots_and_strips_are_written(plan, tmp_path):
    pytest.importorskip("matplotlib")
    evaluate(plan, "cpu", "fp32", tmp_path)
    content = json.loads((tmp_path / "recall.json").read_text())
    assert set(content["header"]) == {"format", "students", "gaps", "columns", "minutes", "device", "dtype"}
    assert {(cell["kind"], cell["policy"]) for cell in content["summary"]["cells"]} == {
        (kind, policy) for kind in ("dwell", "wander", "long") for policy in ("oracle", "none")
    }
    assert all(each["n"] == 2 and each["against"][1] == "oracle" for each in content["summary"]["differences"])
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {"recall.png", "drift.png"} < pictures and len(pictures) == 2 + 6


@pytest.mark.parametrize("content", ["[]", "{", '{"header": {"format": 1}}'], ids=["old", "broken", "other format"])
def test_a_folder_with_something_else_in_it_is_refused(content, tmp_path):
    (tmp_path / "recall.json").write_text(content)
    with pytest.raises(ValueError, match="output: .*give another folder, or delete the file"):
        command.Results(tmp_path, {"format": command.FORMAT})


def test_a_folder_of_the_format_before_is_refused_with_both_formats(tmp_path):
    (tmp_path / "recall.json").write_text('{"header": {"format": 3}, "records": []}')
    match = f"output: .*recall.json has format 3, this version writes {command.FORMAT}; give another"
    with pytest.raises(ValueError, match=match):
        command.Results(tmp_path, {"format": command.FORMAT})


def test_scenes_do_not_change_the_number_of_threads_between_them(monkeypatch):
    """A worker sets its share of the cores before each job; a small network computes on one."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = SceneJob(
        student="demo", file=None, policy="novel", seed=0, scene=0, is_long=False, moves={}, device="cpu", dtype="fp32"
    )
    loaded, before = Loaded(), torch.get_num_threads()
    try:
        for _ in range(2):
            torch.set_num_threads(2)
            assert job.run(loaded) == [] and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
