"""`generate` with a student in Wan's layout: its own text encoder and VAE, out of a ComfyUI models folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from context_forcing.model.codecs.base import denormalise, normalise
from context_forcing.model.codecs.tiny import load_tiny_decoder
from context_forcing.model.codecs.wan_vae import load_wan_vae
from context_forcing.video.frames import to_pixels
from context_forcing.video.mp4 import default_scale, write_video

pytest.importorskip("sentencepiece")
pytest.importorskip("ftfy")

PROMPTS = ("a meadow by day, the camera pans right", "snow at night")


@pytest.fixture(scope="module")
def models(models_dir, save_tiny_student):
    save_tiny_student(models_dir / "diffusion_models" / "student.safetensors", base="wan2.1-1.3b")
    return models_dir


@pytest.fixture
def generate(run, tmp_path, monkeypatch):
    """(prompts, output name, options) -> exit code, stderr."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.chdir(tmp_path)

    def generate(prompts, name, *options):
        segments = [{"prompt": prompt, "seconds": 1.5} for prompt in prompts]
        (tmp_path / "story.yaml").write_text(yaml.safe_dump({"seed": 4, "segments": segments}))
        return run("generate", "story.yaml", "-o", f"{name}.mp4", "--memory-out", f"{name}.memory", *options)

    return generate


def wan(models):
    return "--student", "student.safetensors", "--models-dir", models


def test_prompts_in_video_out_and_a_chain_is_one_run(generate, models, caplog, frames_of, succeeded):
    """Each run encodes its own prompts; the size is the card's."""
    caplog.set_level("INFO", "context_forcing")
    succeeded(generate(PROMPTS, "whole", *wan(models), "--report", "whole.png"))
    assert "umt5.safetensors" in caplog.text and "wan.safetensors" in caplog.text
    size, frames = frames_of("whole.mp4")
    assert (size[0] * 32, len(frames)) == (size[1] * 48, 45)
    succeeded(generate(PROMPTS[:1], "first", *wan(models)))
    succeeded(generate(PROMPTS[1:], "second", *wan(models), "--memory-in", "first.memory", "--report", "second.png"))
    whole, second = load_file("whole.memory"), load_file("second.memory")
    assert whole.keys() == second.keys() and all(torch.equal(whole[key], second[key]) for key in whole)
    assert frames_of("second.mp4") == (size, frames)
    assert Path("whole.png").read_bytes() == Path("second.png").read_bytes()

    succeeded(generate(PROMPTS[::-1], "other", *wan(models)))
    assert not torch.equal(load_file("other.memory")["film"][:, :, :6], whole["film"][:, :, :6]), "prompts matter"


def test_offload_changes_nothing(generate, models, frames_of, succeeded):
    succeeded(generate(PROMPTS, "plain", *wan(models)))
    succeeded(generate(PROMPTS, "offloaded", *wan(models), "--offload"))
    a, b = load_file("plain.memory"), load_file("offloaded.memory")
    assert all(torch.equal(a[key], b[key]) for key in a) and frames_of("plain.mp4") == frames_of("offloaded.mp4")


def test_paths_names_and_comfyui_path_are_the_same(generate, models, tmp_path, monkeypatch, models_dir, succeeded):
    text, vae = models / "text_encoders" / "umt5.safetensors", models / "vae" / "wan.safetensors"
    student = models / "diffusion_models" / "student.safetensors"
    succeeded(generate(PROMPTS[:1], "paths", "--student", student, "--text-encoder", text, "--vae", vae))
    named = ("--text-encoder", "umt5.safetensors", "--vae", "wan.safetensors")
    succeeded(generate(PROMPTS[:1], "names", *wan(models), *named))
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "models").symlink_to(models)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "comfy"))
    succeeded(generate(PROMPTS[:1], "environment", "--student", "student.safetensors"))
    films = [load_file(f"{name}.memory")["film"] for name in ("paths", "names", "environment")]
    assert torch.equal(films[0], films[1]) and torch.equal(films[0], films[2])


def test_a_video_begins_with_what_the_vae_makes_of_a_picture(generate, models, tmp_path, succeeded):
    picture = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    Image.fromarray(picture).save("start.png")
    succeeded(generate(PROMPTS[:1], "film", *wan(models), "--start", "start.png"))
    vae = load_wan_vae(models / "vae" / "wan.safetensors")
    expected = normalise(vae.encode(to_pixels(picture[None])))
    torch.testing.assert_close(load_file("film.memory")["film"][:, :, :1], expected, atol=0, rtol=0)


def test_a_killed_run_resumes_with_the_same_codecs(generate, models, monkeypatch, wan_vae_state, frames_of, succeeded):
    from context_forcing.video.pipeline import Pipeline

    succeeded(generate(PROMPTS, "film", *wan(models)))
    whole = frames_of("film.mp4")
    original = Pipeline.generate

    def interrupted(self, *args, **kwargs):
        for i, memory in enumerate(original(self, *args, **kwargs)):
            if i == 2:
                raise KeyboardInterrupt
            yield memory

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generate", interrupted)
        assert generate(PROMPTS, "film", *wan(models))[0] != 0
    save_file({key: -value for key, value in wan_vae_state.items()}, "other.safetensors")
    code, err = generate(PROMPTS, "film", *wan(models), "--resume", "--vae", "other.safetensors")
    assert code == 2 and "was begun with another codec" in err
    succeeded(generate(PROMPTS, "film", *wan(models), "--resume"))
    assert frames_of("film.mp4") == whole


def test_report_needs_the_vae_alone(generate, run, models, succeeded):
    succeeded(generate(PROMPTS, "film", *wan(models), "--report", "during.png"))
    student = ("--student", models / "diffusion_models" / "student.safetensors")
    vae = ("--vae", models / "vae" / "wan.safetensors")
    assert run("report", "film.memory", "-o", "after.png", *student, *vae)[0] == 0
    assert Path("during.png").read_bytes() == Path("after.png").read_bytes()


def test_a_tiny_decoder_draws_in_place_of_the_vae(
    generate, run, models, tiny_decoder_state, tmp_path, frames_of, succeeded, refused
):
    """No VAE is needed, and the latents are the same; with a start the VAE encodes."""
    save_file(tiny_decoder_state, "taew2_1.safetensors")
    student = ("--student", models / "diffusion_models" / "student.safetensors")
    student += ("--text-encoder", models / "text_encoders" / "umt5.safetensors")
    tiny, vae = ("--decoder", "taew2_1.safetensors"), ("--vae", models / "vae" / "wan.safetensors")
    succeeded(generate(PROMPTS[:1], "film", *student, *tiny, "--report", "during.png"))
    pixels = load_tiny_decoder("taew2_1.safetensors").decode(denormalise(load_file("film.memory")["film"]))
    write_video(tmp_path / "expected.mp4", [pixels], fps=16, scale=default_scale(48, 32))
    assert frames_of("film.mp4") == frames_of("expected.mp4")
    assert run("report", "film.memory", "-o", "after.png", *student[:2], *tiny)[0] == 0
    assert Path("during.png").read_bytes() == Path("after.png").read_bytes()
    again = ("generate", "--like", "film.mp4", "-o", "again.mp4", *student)
    refused(run(*again), "--decoder: give taew2_1.safetensors")

    Image.new("RGB", (48, 32), "red").save("start.png")
    refused(generate(PROMPTS[:1], "next", *student, *tiny, "--start", "start.png"), "--vae")
    succeeded(generate(PROMPTS[:1], "next", *student, *tiny, *vae, "--start", "start.png"))
    encoded = normalise(load_wan_vae(vae[1]).encode(to_pixels(np.full((1, 32, 48, 3), (255, 0, 0), np.uint8))))
    torch.testing.assert_close(load_file("next.memory")["film"][:, :, :1], encoded, atol=0, rtol=0)


def test_refusals_are_one_line_and_write_nothing(generate, models, models_dir, umt5_state, tmp_path, refused):
    student = models / "diffusion_models" / "student.safetensors"
    refused(
        generate(PROMPTS, "film", "--student", student), "student: a Wan 2.1", "--text-encoder", "--vae", "--models-dir"
    )
    refused(generate(PROMPTS, "film", "--student", student, "--vae", student), "--text-encoder")
    refused(generate(PROMPTS, "film", "--vae", "wan.safetensors"), "--vae", "the student is of the demo world")
    refused(generate(PROMPTS, "film", "--decoder", "x.pth"), "--decoder", "the student is of the demo world")
    refused(generate(PROMPTS, "film", *wan(models), "--decoder", "x.pth"), "--decoder: no such file", "vae_approx")
    refused(generate(PROMPTS, "film", *wan(models), "--decoder", "wan.safetensors"), "not a tiny decoder")
    refused(generate(PROMPTS, "film", *wan(models), "--vae", "none.safetensors"), "--vae", "none.safetensors", "nor")
    refused(generate(PROMPTS, "film", *wan(models), "--vae", "wan2.2_vae.safetensors"), "48 latent channels")
    refused(generate(PROMPTS, "film", *wan(models), "--vae", "broken.pt"), "broken.pt: neither a")
    refused(generate(PROMPTS, "film", *wan(models), "--text-encoder", "clip_l.safetensors"), "not a UMT5 encoder")
    refused(generate(PROMPTS, "film", *wan(tmp_path / "none")), "--models-dir", "is not a folder")
    (tmp_path / "empty" / "vae").mkdir(parents=True)
    empty = ("--student", student, "--models-dir", "empty")
    refused(generate(PROMPTS, "film", *empty), "--text-encoder: none of 0 files in empty/text_encoders and empty/clip")
    second = models / "vae" / "another.safetensors"
    second.write_bytes((models / "vae" / "wan.safetensors").read_bytes())
    try:
        refused(generate(PROMPTS, "film", *wan(models)), "--vae: 2 files fit", "another.safetensors, wan.safetensors")
    finally:
        second.unlink()
    assert not list(tmp_path.glob("film*")) and not list(tmp_path.glob(".film*"))
