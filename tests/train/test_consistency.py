"""Videos measured by image features of tiny random models: what is given is what is measured."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from context_forcing.train.evaluation.consistency import PretrainedFeatures, evaluate_videos, measure_video
from context_forcing.video.mp4 import write_video

FPS = 8
CPU = torch.device("cpu")
PREPROCESSOR = {
    "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "image_processor_type": "CLIPImageProcessor",
}  # fmt: skip
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


class MeanColour:
    """In place of a model: a frame's mean colour, of unit length."""

    feature = "mean colour"

    def __call__(self, pictures):
        means = torch.tensor(np.array([picture.mean((0, 1)) for picture in pictures]))
        return torch.nn.functional.normalize(means, dim=-1).float()


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Four seconds each: a still picture, and colours that turn from red to green."""
    folder = tmp_path_factory.mktemp("films")
    red, green = (torch.tensor(colour).view(1, 3, 1, 1, 1) for colour in ([1.0, -1, -1], [-1.0, 1, -1]))
    share = torch.linspace(0, 1, 4 * FPS).view(1, 1, -1, 1, 1)
    turning = (red + (green - red) * share).expand(-1, -1, -1, 48, 64)
    write_video(folder / "still.mp4", [turning[:, :, :1].expand(-1, -1, 4 * FPS, -1, -1)], fps=FPS)
    write_video(folder / "turning.mp4", [turning], fps=FPS)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny random models as `save_pretrained` leaves them, by architecture."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**SIZES, projection_dim=16)
    text = transformers.CLIPTextConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    whole = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )  # fmt: skip
    dino = transformers.Dinov2Config(**{name: SIZES[name] for name in SIZES if name != "intermediate_size"})
    nets = {
        "CLIPModel": transformers.CLIPModel(whole),
        "CLIPVisionModel": transformers.CLIPVisionModel(vision),
        "CLIPVisionModelWithProjection": transformers.CLIPVisionModelWithProjection(vision),
        "Dinov2Model": transformers.Dinov2Model(dino),
    }
    folders = {}
    for name, net in nets.items():
        folders[name] = tmp_path_factory.mktemp(name)
        net.save_pretrained(folders[name])
        (folders[name] / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folders


def test_a_still_picture_is_consistent_and_does_not_move(films):
    curve = measure_video(films / "still.mp4", {"colour": MeanColour()}, 1.0)
    assert curve.times == (0, 1, 2, 3) and curve.num_frames == 4 * FPS
    assert curve.similarity["colour"] == pytest.approx([1] * 4, abs=1e-4)
    assert max(curve.motion) < 0.05


def test_a_picture_that_turns_is_told_by_its_angle_and_its_motion(films):
    curve = measure_video(films / "turning.mp4", {"colour": MeanColour()}, 0.5)
    share = np.arange(8) * 4 / (4 * FPS - 1)
    expected = (1 - share) / np.hypot(1 - share, share)
    assert curve.times == tuple(np.arange(8) / 2)
    assert curve.similarity["colour"] == pytest.approx(expected, abs=0.03)
    # Two of three colours change by one step of 31 each frame.
    assert curve.motion[0] == 0 and curve.motion[1:] == pytest.approx([100 * 2 / 3 / 31] * 7, rel=0.15)


def test_a_look_may_fall_between_frames(films):
    curve = measure_video(films / "turning.mp4", {"colour": MeanColour()}, 0.3)
    assert curve.times == tuple(np.floor(np.arange(14) * 0.3 * FPS + 0.5) / FPS)


def prepared(picture):
    """PREPROCESSOR in pillow and torch: the shorter side becomes 32, then the centre is cropped and normalised."""
    width, height = picture.shape[1::-1]
    size = tuple(int(32 * side / min(width, height)) for side in (width, height))
    image = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - 32) // 2 for side in size)
    pixels = np.array(image.crop((left, top, left + 32, top + 32)))
    return (torch.from_numpy(pixels).movedim(-1, 0) / 255 - 0.5) / 0.25


@pytest.mark.parametrize("size", [(48, 96), (40, 64), (64, 41), (33, 77), (32, 32)])
def test_pictures_are_prepared_as_the_model_asks(models, size):
    extractor, given = PretrainedFeatures("clip", models["CLIPVisionModel"], CPU, torch.float32), []
    extractor._net.register_forward_pre_hook(lambda *call: given.append(call[2]["pixel_values"]), with_kwargs=True)
    picture = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    extractor([picture])
    assert given[0].shape == (1, 3, 32, 32) and torch.allclose(given[0][0], prepared(picture), atol=1e-5)


@pytest.mark.parametrize(
    "architecture, feature, width",
    [
        ("CLIPModel", "projected", 16),
        ("CLIPVisionModelWithProjection", "projected", 16),
        ("CLIPVisionModel", "pooled", 32),
        ("Dinov2Model", "class token", 32),
    ],
)
def test_features_are_those_of_the_model_in_the_folder(models, architecture, feature, width):
    import transformers

    folder = models[architecture]
    extractor = PretrainedFeatures("dino" if "Dino" in architecture else "clip", folder, CPU, torch.float32)
    assert extractor.feature == feature
    picture = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    features = extractor([picture, picture[:, ::-1]])
    assert features.shape == (2, width) and features.norm(dim=1) == pytest.approx([1, 1])
    net = getattr(transformers, architecture).from_pretrained(folder).eval()
    pixels = prepared(picture)[None]
    with torch.no_grad():
        if architecture == "CLIPModel":
            expected = net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output)
        else:
            out = net(pixel_values=pixels)
            expected = {
                "projected": lambda: out.image_embeds,
                "pooled": lambda: out.pooler_output,
                "class token": lambda: out.last_hidden_state[:, 0],
            }[feature]()
    assert torch.allclose(features[0], torch.nn.functional.normalize(expected[0], dim=0), atol=1e-5)


@pytest.mark.parametrize("given", [("clip",), ("dino",), ("clip", "dino")], ids=" and ".join)
def test_one_model_is_enough(models, films, given, tmp_path):
    folders = {"clip": models["CLIPVisionModel"], "dino": models["Dinov2Model"]}
    clip, dino = (folders[kind] if kind in given else None for kind in ("clip", "dino"))
    (table,) = evaluate_videos(
        [films / "still.mp4", films / "turning.mp4"], clip, dino, 0.5, "cpu", "fp32", tmp_path
    )  # fmt: skip
    content = json.loads((tmp_path / "consistency.json").read_text())
    assert set(content["models"]) == set(given) and table.row_count == 2 * (len(given) + 1)
    still, turning = content["videos"]
    assert (still["name"], turning["name"]) == ("still", "turning")
    for kind in given:
        assert min(still["similarity"][kind]) > 0.999 > min(turning["similarity"][kind])
    assert max(still["motion"]) < 0.05 < min(turning["motion"][1:])


def test_the_plot_is_drawn(models, films, tmp_path):
    evaluate_videos([films / "turning.mp4"], models["CLIPVisionModel"], None, 0.5, "cpu", "fp32", tmp_path)
    assert (tmp_path / "consistency.png").stat().st_size > 10_000


def test_weights_that_are_not_whole_are_refused(models, tmp_path):
    """transformers would fill the gap with random numbers."""
    for file in models["CLIPVisionModel"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["CLIPVisionModelWithProjection"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="clip: .* 1 tensors are missing, visual_projection.weight"):
        PretrainedFeatures("clip", tmp_path, CPU, torch.float32)


def test_folders_that_hold_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dino: .*config.json: cannot be read"):
        PretrainedFeatures("dino", tmp_path, CPU, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match="dino: .* holds BertModel, not one of Dinov2Model"):
        PretrainedFeatures("dino", tmp_path, CPU, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Dinov2Model"], "model_type": "dinov2"}))
    with pytest.raises(ValueError, match="dino: .* image processor"):
        PretrainedFeatures("dino", tmp_path, CPU, torch.float32)


def test_what_cannot_be_watched_is_refused(films, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="ffmpeg finds no video"):
        measure_video(tmp_path / "text.mp4", {}, 1.0)
    with pytest.raises(ValueError, match="every: 9 s; .* has 4 s"):
        measure_video(films / "still.mp4", {}, 9.0)
    with pytest.raises(ValueError, match="every: 0.01 s .* give 0.125 or more"):
        measure_video(films / "still.mp4", {}, 0.01)
    for videos, clip, match in (
        ([films / "still.mp4"], None, "clip, dino: none given"),
        ([], tmp_path, "clip: for videos only"),
        ([tmp_path / "none.mp4"], tmp_path, "video: .*none.mp4: there is no such file"),
    ):
        with pytest.raises(ValueError, match=match):
            evaluate_videos(videos, clip, None, 1.0, "cpu", "fp32", tmp_path)
