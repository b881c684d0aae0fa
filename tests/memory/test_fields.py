"""Mappings from files become keyword arguments, or are refused by key."""

from dataclasses import dataclass

import pytest

from context_forcing.memory.fields import check_keys, checked_fields, json_object


@dataclass
class Example:
    name: str
    size: tuple[int, int] | None = None
    steps: tuple[float, ...] = ()
    tags: list[str] | None = None


def test_lists_become_tuples_where_the_field_is_one():
    raw = {"name": "a", "size": [1, 2], "steps": [3.0], "tags": ["b"]}
    expected = Example(name="a", size=(1, 2), steps=(3.0,), tags=["b"])
    assert Example(**checked_fields(Example, raw, "example")) == expected
    assert raw["size"] == [1, 2]
    assert checked_fields(Example, {"name": "a", "size": None}, "example") == {"name": "a", "size": None}


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"name": "a", "sizes": 3}, "example.sizes: unknown key; known keys are name, size, steps, tags"),
        ({"name": "a", 3: 3}, "example.3: unknown key"),
        ({"name": "a", "": 3}, "example.'': unknown key"),
        ({}, "example.name: missing"),
        (["name"], "example: ['name'] is not a mapping"),
        (None, "example: is empty; known keys are name, size"),
    ],
)
def test_refusals_name_the_key(raw, message):
    with pytest.raises(ValueError) as caught:
        checked_fields(Example, raw, "example")
    assert str(caught.value).startswith(message)


def test_keys_alone():
    assert check_keys(Example, {"size": [1]}, "") == {"size": [1]}
    with pytest.raises(ValueError, match="^sizes: unknown key"):
        check_keys(Example, {"sizes": 1}, "")


def test_json_objects():
    assert json_object('{"a": [1]}', "card") == {"a": [1]}
    for text, message in (
        ("", "card: not JSON"),
        ("[" * 100_000, "card: not JSON"),
        ("[1]", "card: not a JSON object"),
    ):
        with pytest.raises(ValueError, match=f"^{message}") as caught:
            json_object(text, "card")
        assert "\n" not in str(caught.value)
