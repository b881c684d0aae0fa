"""Names of new files: tokens, and prefixes that are refused."""

import os
import time

import pytest

MOMENT = time.struct_time((2026, 3, 9, 4, 5, 6, 0, 68, 0))
PROMPT = {
    "1": {"class_type": "ContextForcingSampler", "inputs": {"seconds": 3.5, "seed": 7, "memory": ["2", 0]}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a/b: c"}, "_meta": {"title": "First prompt"}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "second"}, "_meta": {"title": "Second prompt"}},
}


@pytest.fixture
def files(node_module, tmp_path, monkeypatch):
    module = node_module("output_files")
    (tmp_path / "output").mkdir()
    monkeypatch.setattr(module.folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    monkeypatch.setattr(
        module.folder_paths,
        "get_save_image_path",
        lambda prefix, root, width, height: (os.path.join(root, "a"), f"b{width}", 7, "a", prefix),
    )
    return module


def test_a_new_file_is_numbered(files, tmp_path):
    file = files.new_file("a/b", ".mp4", size=(640, 360))
    assert file.path == str(tmp_path / "output" / "a" / "b640_00007_.mp4")
    assert file.relative == os.path.join("a", "b640_00007_.mp4")


@pytest.mark.parametrize(
    "prefix, name",
    [
        ("video/%ContextForcingSampler.seed%_x", "video/7_x"),
        ("%First prompt.text%", "a_b_ c"),
        ("%CLIPTextEncode.text%", "a_b_ c"),
        ("%Second prompt.text%/%ContextForcingSampler.seconds%", "second/3.5"),
        # ComfyUI replaces these itself, or nobody does: a link has no value.
        ("%width%_%year%", "%width%_%year%"),
        ("%Nobody.text%", "%Nobody.text%"),
        ("%ContextForcingSampler.memory%", "%ContextForcingSampler.memory%"),
        ("100%", "100%"),
    ],
)
def test_tokens(files, prefix, name):
    assert files.replace_tokens(prefix, PROMPT) == name


@pytest.mark.parametrize(
    "form, text",
    [("yyyy-MM-dd", "2026-03-09"), ("yy.M.d", "26.3.9"), ("hhmmss", "040506"), ("h:m:s", "4:5:6")],
)
def test_dates(files, form, text):
    assert files.format_date(form, MOMENT) == text


def test_a_date_in_a_prefix_has_no_folder(files):
    assert files.replace_tokens("%date:yyyy/MM%", {}) == time.strftime("%Y_%m")


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "/etc/x", "", ".", "a/..", "link/x"])
def test_a_prefix_outside_the_output_folder_is_refused(files, tmp_path, prefix):
    (tmp_path / "output" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="filename_prefix: .* not a file under the output folder; give") as error:
        files.new_file(prefix, ".mp4")
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("prefix", ["a/" * 600 + "x", "x" * 201, f"a/{'é' * 101}/x", "a" * 200 + "%Load.file%"])
def test_a_prefix_that_is_too_long_is_refused(files, prefix):
    prompt = {"1": {"class_type": "Load", "inputs": {"file": "b"}}}
    with pytest.raises(ValueError, match="^filename_prefix: .* is too long; give at most 1000 characters") as error:
        files.check_prefix(prefix, prompt)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("prefix", ["x", "a/b/x", "a/../x", "a/", "..x", "b/" + "é" * 100])
def test_other_prefixes_are_not_refused(files, prefix):
    assert files.check_prefix(prefix) == prefix
