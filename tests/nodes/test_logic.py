"""Logic of the nodes without ComfyUI, whose modules are stubs here."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

from context_forcing.memory import MemoryConfig
from context_forcing.memory.packed import KV_DTYPES
from context_forcing.model.config import StudentCard
from context_forcing.model.fingerprint import fingerprint
from context_forcing.model.sampler import COMMIT_ATTENDS, KV_PLACEMENTS, working_bytes

CPU = torch.device("cpu")


@pytest.fixture
def fake_model(net):
    """(card) -> what the nodes read of a MODEL."""

    def make(card=None, kind="WAN21", in_channels=16, **attributes):
        patch_embedding = SimpleNamespace(in_channels=in_channels)
        tree = SimpleNamespace(
            patch_embedding=patch_embedding, img_emb=None, named_parameters=net.named_parameters, blocks=net.blocks,
            patch_size=net.patch_size, text_len=net.text_len,
        )  # fmt: skip
        base = type(kind, (), {"diffusion_model": tree, "get_dtype": lambda self: torch.float32})()
        fields = dict(
            model=base, load_device=CPU, backup={}, object_patches={}, wrappers={},
            model_options={"transformer_options": {}}, get_attachment=lambda name: card,
            get_additional_models_with_key=lambda key: [],
            get_model_object=lambda name: None,
        )  # fmt: skip
        return SimpleNamespace(**fields | attributes)

    return make


def test_its_card(node_module, fake_model, caplog):
    of = node_module("model_access").StudentModel.of
    card = StudentCard(shift=3.0)
    assert of(fake_model(card)).card is card and not caplog.records
    assert of(fake_model()).card == StudentCard() and "no student card" in caplog.text


@torch.inference_mode()
def test_prompts_of_one_node_are_not_those_of_the_next(node_module, net, fake_model):
    """Between two nodes a LoRA may be merged into the same modules in place."""
    model, rows, found = fake_model(StudentCard()), torch.ones(1, 5, net.config.text_dim), []
    model.model.diffusion_model.text_embedding = net.text_embedding
    for _ in range(2):
        network = node_module("model_access").StudentModel.of(model).network
        found.append(network.embed_text(rows).values[0])
        assert network.embed_text(rows).values[0] is found[-1]
        net.blocks[0].cross_attn.v.weight.data.neg_()  # the second time, back to what it was
    assert not torch.allclose(*found, atol=1e-3)


def test_model_sampling_replaces_the_shift(node_module, fake_model, caplog):
    access = node_module("model_access")
    sampling = access.comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.shift = 8
    student = access.StudentModel.of(fake_model(StudentCard(), object_patches={"model_sampling": sampling}))
    assert student.card.shift == 8.0 and "shift 8" in caplog.text


@pytest.mark.parametrize(
    "kind, channels, message",
    [("LTXV", 16, "model: LTXV is not Wan 2.1"), ("WAN21", 36, "model: WAN21 with 36 input channels")],
)
def test_other_models_are_refused(node_module, fake_model, kind, channels, message):
    with pytest.raises(ValueError, match=message):
        node_module("model_access").StudentModel.of(fake_model(kind=kind, in_channels=channels))


def test_its_fingerprint_is_that_of_the_weights_before_loras(node_module, fake_model, net):
    of, name = node_module("model_access").StudentModel.of, "blocks.0.ffn.0.weight"
    original = dict(net.named_parameters())[name]
    parameters = [(key, -value if key == name else value) for key, value in net.named_parameters()]
    changed = fake_model(StudentCard())
    changed.model.diffusion_model.named_parameters = lambda: parameters
    assert of(changed).fingerprint != fingerprint(net)
    changed.backup = {f"diffusion_model.{name}": SimpleNamespace(weight=original)}
    assert of(changed).fingerprint == fingerprint(net)


@pytest.mark.parametrize("policy", ["novel", "released"])
@pytest.mark.parametrize("layout", KV_PLACEMENTS)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_what_the_memory_has_on_the_device_is_not_asked_for_again(
    node_module, fake_model, net, empty_memory, rollout, monkeypatch, policy, layout, kv_dtype
):
    sampler, student = (
        node_module("sampler"),
        node_module("model_access").StudentModel.of(fake_model(StudentCard())),
    )
    requests = []
    load = lambda models, memory_required: requests.append(memory_required)
    monkeypatch.setattr(sampler.mm, "load_models_gpu", load)
    monkeypatch.setattr(sampler.mm, "get_total_memory", lambda device: 1e12)
    memory = rollout(empty_memory(policy=policy), 2)
    assert memory.num_bytes > 0
    sampler.make_room(student, memory, layout, kv_dtype)
    needed = working_bytes(student.network, memory, layout, kv_dtype=kv_dtype)
    assert requests == [needed - (0 if layout == "from RAM" else memory.num_bytes)]


def test_too_little_memory_is_logged(node_module, fake_model, empty_memory, monkeypatch, caplog):
    sampler, student = (
        node_module("sampler"),
        node_module("model_access").StudentModel.of(fake_model(StudentCard())),
    )
    monkeypatch.setattr(sampler.mm, "get_total_memory", lambda device: 1e3)
    sampler.make_room(student, empty_memory(), "at once", "auto")
    assert "from RAM" in caplog.text


@pytest.fixture
def prepared(node_module, net, empty_memory, fake_model, make_sampler, monkeypatch):
    """(card, **inputs) -> the sampler that the node prepares."""
    monkeypatch.setattr(node_module("sampler"), "make_room", lambda *_: None)
    network = make_sampler(net).network

    def prepare(card, **given):
        student = SimpleNamespace(model=fake_model(card), commit=[], network=network, card=card, fingerprint="me")
        return node_module("sampler").prepare_sampler(student, empty_memory(), **given)(torch.ones(1, 5, 32))

    return prepare


def test_the_card_says_what_the_commit_pass_attends_to_unless_the_node_does(node_module, prepared):
    attends = lambda **given: prepared(StudentCard(commit_attends="fast only"), **given).commit_attends
    inputs = node_module("sampler").ContextForcingSampler.define_schema().inputs
    (choice,) = (e for e in inputs if e.id == "commit_attends")
    assert attends() == attends(commit_attends=choice.default) == "fast only"
    saved = [attends(commit_attends=option) for option in choice.options if option != choice.default]
    assert saved == list(COMMIT_ATTENDS), "a saved graph with a value keeps it"


def test_frames_are_stored_as_the_node_says(node_module, prepared):
    for node in (node_module("sampler").ContextForcingSampler, node_module("storyboard").ContextForcingStoryboard):
        choice = node.define_schema().inputs[-1]
        assert (choice.id, tuple(choice.options), choice.default) == ("kv_dtype", KV_DTYPES, "auto")
    stored = lambda **given: prepared(StudentCard(), **given).options.kv_dtype
    assert stored() == "auto" and [stored(kv_dtype=name) for name in KV_DTYPES] == list(KV_DTYPES)


def test_a_storyboard_that_comfyuis_cache_cannot_take_is_refused(node_module, empty_memory, monkeypatch):
    """Else the user reads: maximum recursion depth exceeded."""
    module = node_module("storyboard")
    board = module.ContextForcingStoryboard
    monkeypatch.setattr(module.StudentModel, "of", lambda model: SimpleNamespace(card=StudentCard()))
    links = SimpleNamespace(get_node=lambda node: {"inputs": {key: ["1", 0] for key in ("model", "clip", "memory")}})
    monkeypatch.setattr(board, "hidden", SimpleNamespace(dynprompt=links, unique_id="2"), raising=False)
    memory, most = node_module("handle").MemoryHandle.of(empty_memory()), sys.getrecursionlimit() - 100

    def run(count):
        text = "".join(f"{0.75 * number} A meadow.\n" for number in range(count)) + f"{0.75 * count}"
        return board.execute(None, None, memory, text, 0)

    assert len(run(most).result[1].splitlines()) == most + 1
    with pytest.raises(ValueError, match=f"^text: {most + 1} segments are more than {most}, .* second storyboard"):
        run(most + 1)


TEXT = torch.ones(1, 5, 4096)


def test_one_prompt(node_module, caplog):
    assert node_module("sampler").text_of([[TEXT, {"pooled_output": None}]]) is TEXT
    assert not caplog.records


def test_options_without_effect_are_named(node_module, caplog):
    node_module("sampler").text_of([[TEXT, {"pooled_output": None, "hooks": object()}]])
    assert [record.getMessage() for record in caplog.records] == [
        "positive: hooks of the conditioning has no effect in this sampler"
    ]


@pytest.mark.parametrize("positive", [[[TEXT, {}]] * 2, [[TEXT.expand(2, -1, -1), {}]], []])
def test_other_numbers_of_prompts_are_refused(node_module, positive):
    with pytest.raises(ValueError, match=f"positive: {2 if positive else 0} prompts"):
        node_module("sampler").text_of(positive)


def test_what_has_no_effect_is_named(node_module, fake_model):
    patches = node_module("patches")
    model = fake_model(
        object_patches=dict.fromkeys(
            (
                "manual_cast_dtype",
                "diffusion_model.head.head.forward",
                "diffusion_model.blocks.1.ffn",
                "diffusion_model.x",
            )
        ),
        wrappers={"diffusion_model": {"cache": [print], None: [print], "empty": []}},
        model_options={
            "context_handler": object(),
            "denoise_mask_function": None,
            "transformer_options": {
                "patches": {"attn1_patch": [print], "attn2_patch": []},
                "patches_replace": {"dit": {("double_block", 1): print, ("double_block", 2): print}},
                "rope_options": {},
            },
        },
    )
    assert sorted(patches.ignored_patches(model)) == [
        "attn1_patch patch", "context_handler", "diffusion_model wrapper cache", "diffusion_model wrapper print",
        "double_block_1 replacement", "object patch diffusion_model.x", "rope_options",
    ]  # fmt: skip
    assert not list(patches.ignored_patches(fake_model()))


HEADS = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, head_dim=16)


def test_attention_of_another_node_is_named_where_it_is_not_used(node_module, fake_model, caplog):
    patches = node_module("patches")
    model = fake_model(model_options={"transformer_options": {patches.OVERRIDE: print}})
    assert patches.attention_of(model, "sdpa", HEADS) is patches.sdpa and "comfyui" in caplog.text


def comfyuis(q, k, v, heads, mask=None, **options):
    """Attention as ComfyUI's functions compute it, without PyTorch's function."""
    assert options.pop("skip_reshape") and options.pop("skip_output_reshape") and heads == q.shape[1]
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + (0 if mask is None else mask)).softmax(-1) @ v


@pytest.fixture
def registered(node_module, monkeypatch):
    """What ComfyUI registers."""
    functions = {"mine": comfyuis}
    for name in ("patches", "shared"):
        monkeypatch.setattr(node_module(name), "REGISTERED_ATTENTION_FUNCTIONS", functions)
    return functions


@pytest.mark.parametrize("name", ["comfyui", "mine"])
def test_comfyuis_attention_has_its_layout(node_module, fake_model, registered, monkeypatch, name):
    patches = node_module("patches")
    monkeypatch.setattr(patches, "optimized_attention", comfyuis)
    q, k, v = torch.randn(1, 5, 2, 16), torch.randn(1, 7, 2, 16), torch.randn(1, 7, 2, 16)
    attention = patches.attention_of(fake_model(), name, HEADS)
    for bias in (None, torch.randn(1, 1, 1, 7)):
        torch.testing.assert_close(attention(q, k, v, bias), patches.sdpa(q, k, v, bias))


def test_what_comfyui_registers_is_offered(node_module, registered):
    entry = node_module("shared").attention_input()
    assert entry.options == ["sdpa", "comfyui", "mine"] and entry.default == "sdpa"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda q, k, v, heads, **options: comfyuis(q, k.roll(1, dims=2), v, heads, **options), "differs from sdpa"),
        (lambda q, k, v, heads, **options: torch.nn.functional.scaled_dot_product_attention(q, k, v), "left its self"),
    ],
)
def test_what_comfyui_registers_is_tested(node_module, fake_model, registered, function, words):
    patches, registered["mine"] = node_module("patches"), function
    with pytest.raises(ValueError, match=f"^attention: mine {words}.*; use .*sdpa$"):
        patches.attention_of(fake_model(), "mine", HEADS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sage3", "sage3 needs the package sageattn3 .*; install it by docs/performance.md, or use sdpa"),
        ("theirs", "'theirs' is not one of sdpa, comfyui, mine; use sdpa"),
    ],
)
def test_attention_that_is_not_here_is_refused_with_its_remedy(node_module, fake_model, registered, name, words):
    for node in (node_module("sampler").ContextForcingSampler, node_module("storyboard").ContextForcingStoryboard):
        assert node.validate_inputs(attention=name), "the page would show no remedy"
    with pytest.raises(ValueError, match=f"^attention: {words}$"):
        node_module("patches").attention_of(fake_model(), name, HEADS)


AS_IS = dict(steps="", shift=0.0, solver="as is", fps=0, sizes={"chunk": -1, "sink": -1})


def test_nothing_is_changed_by_default(node_module):
    card = StudentCard(shift=3.0, first_steps=(1000.0, 500.0))
    assert node_module("student_settings").with_settings(card, **AS_IS) == card


def test_settings_replace_single_fields(node_module):
    card = StudentCard(shift=3.0, first_steps=(1000.0, 500.0))
    settings = AS_IS | dict(steps=" 1000, 250 ", fps=8, solver="euler", sizes={"sink": 0, "slow": -1})
    assert node_module("student_settings").with_settings(card, **settings) == dataclasses.replace(
        card, steps=(1000.0, 250.0), first_steps=(), fps=8, solver="euler",
        memory=dataclasses.replace(card.memory, sink=0),
    )  # fmt: skip


def test_wrong_steps_are_named(node_module):
    with pytest.raises(ValueError, match="^steps: '1000, abc' is not a list of numbers"):
        node_module("student_settings").with_settings(StudentCard(), **AS_IS | {"steps": "1000, abc"})


@pytest.mark.parametrize(
    "disabled, extra, names",
    [(False, {"workflow": {}}, {"workflow", "prompt"}), (False, None, {"prompt"}), (True, {"workflow": {}}, set())],
)
def test_tags_of_a_video(node_module, monkeypatch, disabled, extra, names):
    """None if ComfyUI was started with --disable-metadata."""
    module = node_module("video")
    monkeypatch.setattr(module, "args", SimpleNamespace(disable_metadata=disabled))
    assert set(module.graph_tags({"1": {}}, extra)) == names


def test_a_film_without_frames_is_refused(node_module, empty_memory):
    module = node_module("video")
    handle = node_module("handle").MemoryHandle.of(empty_memory())
    with pytest.raises(ValueError, match="memory: it has no video yet; connect the memory of a sampler"):
        module.ContextForcingSaveVideo.execute(handle, vae=None, filename_prefix="x", fps=16.0, scale=1)


def test_messages_name_what_the_user_chose(node_module):
    named_as = node_module("shared").named_as
    for given, message in (("/srv/a.pt: damaged", "file: a.pt: damaged"), ("file: missing", "file: missing")):
        with pytest.raises(ValueError) as error, named_as("file", "/srv/a.pt", "a.pt"):
            raise ValueError(given)
        assert str(error.value) == message


def test_a_picture_is_an_image(node_module):
    from PIL import Image

    output = node_module("shared").picture_output(Image.new("RGB", (6, 4), (255, 0, 51)), "text", node=object)
    image, text = output.result
    assert image.shape == (1, 4, 6, 3) and image[0, 0, 0].tolist() == pytest.approx([1, 0, 0.2]) and text == "text"


def test_the_default_memory_of_a_card(node_module, fake_model):
    """All settings left as trained."""
    card = StudentCard(size=(64, 32), memory=MemoryConfig(sink=1, slow=2))
    node = node_module("memory").ContextForcingMemory
    (handle,) = node.execute(fake_model(card), 0, 0, "as trained", -1, -1, -1, -1.0).result
    assert handle.memory.config == card.memory and handle.memory.latent_size == (16, 4, 8)
    (handle,) = node.execute(fake_model(card), 96, 0, "fifo", -1, 4, -1, -1.0).result
    assert handle.memory.config == dataclasses.replace(card.memory, policy="fifo", slow=4)
    assert handle.memory.latent_size == (16, 4, 12)
