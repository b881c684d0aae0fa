"""The log of a run that is resumed."""

import json

from context_forcing.train.log import RunLog


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_run_that_is_killed_at_once_keeps_the_lines_before(tmp_path):
    with RunLog(tmp_path, "test", 9) as run_log:
        for step in range(4):
            run_log.log_step(step, {"loss": 1.0})
    with RunLog(tmp_path, "test", 9, start=3) as run_log:
        assert steps_in(tmp_path) == [0, 1, 2], "on the disk before the first step"
        run_log.log_step(3, {"loss": 1.0})
    assert steps_in(tmp_path) == [0, 1, 2, 3]
    with RunLog(tmp_path, "test", 9):
        assert steps_in(tmp_path) == [], "a run that begins again"
