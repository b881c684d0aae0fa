"""What messages quote: one short line, whatever the value."""

import pytest

from context_forcing.memory.fields import MAX_BRIEF, MAX_MESSAGE, brief, one_line, quoted

EVERYTHING = []
EVERYTHING.append(EVERYTHING)
for _ in range(40):
    EVERYTHING = [EVERYTHING] * 10  # 10**40 values, if they were printed


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, "a\nb" * 1000, b"x" * 10**6, 10**5000, [10**5000], {10**5000: 1}, EVERYTHING, [["x" * 99] * 99] * 99],
    ids=lambda value: type(value).__name__,
)
def test_a_quoted_value_is_one_short_line(value):
    text = quoted(value)
    assert len(text) <= MAX_BRIEF and "\n" not in text and text


@pytest.mark.parametrize("value", ["sink", 3, -1.5, True, None, [128, 63], {"a": 1}, ["all"], 2**63])
def test_a_short_value_is_quoted_as_it_is(value):
    assert quoted(value) == repr(value)


def test_the_end_of_a_long_text_is_left_out():
    assert brief("one  line\nof text") == "one line of text"
    assert brief("0123456789", 10) == "0123456789" and brief("0123456789a", 10) == "0123456..."


def test_a_message_is_one_line_of_300_characters():
    assert one_line("size: 3 is\n odd\x1b[2J; give 4") == "size: 3 is odd [2J; give 4"
    path = "/" + "a/" * 400 + "student.safetensors"
    line = one_line(f"{path}: no such file; give another")
    assert line.startswith("/a/a/") and line.endswith("student.safetensors: no such file; give another")
    assert len(line) <= MAX_MESSAGE
    assert len(one_line("many words " * 100)) == MAX_MESSAGE and one_line("x" * 300) == "x" * 300
    assert one_line("caf\udce9: no such file") == "caf : no such file", "a name that is not UTF-8 can be printed"
