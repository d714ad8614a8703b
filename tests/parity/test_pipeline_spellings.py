"""What users of diffusers type around pipelines, each line beside the reference where it has a value."""

import logging

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import joyedit
from joyedit.checkpoints.missing import NotHereError

PIPELINES = ["JoyImageEditPipeline", "ChronoEditPipeline", "StableDiffusionDiffEditPipeline"]
TINY = {
    "JoyImageEditPipeline": "tiny-joyimage",
    "ChronoEditPipeline": "tiny-chronoedit",
    "StableDiffusionDiffEditPipeline": "tiny-diffedit",
}
DiffEdit = joyedit.StableDiffusionDiffEditPipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DiffEdit folder that both libraries open."""
    folder = tmp_path_factory.mktemp("tiny-diffedit")
    joyedit.load("tiny-diffedit", device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return diffusers.StableDiffusionDiffEditPipeline.from_pretrained(folder, safety_checker=None)


@pytest.fixture
def pipe(folder):
    return DiffEdit.from_pretrained(folder)


@pytest.fixture(scope="module")
def layers():
    """Factors for two layers of the UNet and one of the text encoder, without their prefixes."""
    pipe = joyedit.load("tiny-diffedit", device="cpu")
    found = {}
    for part, count in (("unet", 2), ("text_encoder", 1)):
        weights = [
            (name, p)
            for name, p in getattr(pipe, part).named_parameters()
            if name.endswith("q.weight") or name.endswith("q_proj.weight")
        ]
        found[part] = {}
        for name, weight in weights[:count]:
            layer = name.removesuffix(".weight")
            found[part][f"{layer}.lora_A.weight"] = torch.randn(3, weight.shape[1])
            found[part][f"{layer}.lora_B.weight"] = torch.randn(weight.shape[0], 3)
    return found


def test_words_of_saving(pipe, tmp_path):
    pipe.save_pretrained(
        save_directory=tmp_path / "a", safe_serialization=True, push_to_hub=False, is_main_process=True
    )
    assert (tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    for part in (pipe, pipe.unet, pipe.scheduler, pipe.tokenizer):
        with pytest.raises(ValueError, match=r"push_to_hub=True: save, then huggingface_hub.upload_folder"):
            part.save_pretrained(tmp_path / "b", push_to_hub=True)
    for part in (pipe, pipe.unet):
        with pytest.raises(ValueError, match=r"safe_serialization=False: pickles are not written"):
            part.save_pretrained(tmp_path / "b", safe_serialization=False)
    with pytest.raises(TypeError, match=r"'max_shard_sise' \(did you mean 'max_shard_size'"):
        pipe.save_pretrained(tmp_path / "b", max_shard_sise="1GB")
    assert not (tmp_path / "b").exists()


def test_configs_are_saved_and_loaded(pipe, theirs, folder, tmp_path):
    pipe.save_config(tmp_path)
    assert DiffEdit.load_config(tmp_path) == DiffEdit.load_config(folder)
    expected = diffusers.StableDiffusionDiffEditPipeline.load_config(folder)
    assert DiffEdit.load_config(folder) == {
        k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()
    }
    assert DiffEdit.config_name == type(theirs).config_name


DTYPES = [
    pytest.param({"unet": torch.bfloat16, "default": torch.float32}, marks=pytest.mark.slow),
    pytest.param({"default": torch.bfloat16}, marks=pytest.mark.slow),
    {"text_encoder": torch.float16, "default": torch.bfloat16},
    torch.bfloat16,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_by_part(folder, dtype):
    theirs = diffusers.StableDiffusionDiffEditPipeline.from_pretrained(
        folder, torch_dtype=dtype, safety_checker=None
    )
    for ours in (
        DiffEdit.from_pretrained(folder, torch_dtype=dtype),
        joyedit.load(folder, torch_dtype=dtype, device="cpu"),
        joyedit.load(folder, dtype=dtype, device="cpu"),
    ):
        for name, network in ours.networks.items():
            assert network.dtype == getattr(theirs, name).dtype, name


def test_dtypes_that_do_not_fit(folder):
    with pytest.raises(ValueError, match=r"there is no part 'unett' \(did you mean 'unet'"):
        DiffEdit.from_pretrained(folder, torch_dtype={"unett": torch.float16})
    with pytest.raises(ValueError, match="a network takes one dtype"):
        joyedit.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype={"unet": torch.float16})
    with pytest.raises(ValueError, match="two different dtypes"):
        joyedit.load(folder, dtype="fp32", torch_dtype=torch.float16)
    part = DiffEdit.from_pretrained(folder, torch_dtype={"vae": torch.bfloat16})
    assert (part.vae.dtype, part.unet.dtype) == (torch.bfloat16, DiffEdit.from_pretrained(folder).unet.dtype)


@pytest.mark.parametrize(
    "device_map",
    ["cpu", {"": "cpu"}, *(pytest.param(one, marks=pytest.mark.slow) for one in (torch.device("cpu"), None))],
)
def test_device_map(folder, device_map):
    pipe = DiffEdit.from_pretrained(folder, device_map=device_map)
    assert pipe.device.type == "cpu"
    unet = joyedit.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", device_map=device_map)
    assert unet.device.type == "cpu"


@pytest.mark.parametrize(
    "device_map, message",
    [
        ("balanced", "where memory is short, offload="),
        ({"unet": "cpu", "vae": "meta"}, "a network runs on one device"),
        pytest.param(
            "cuda",
            "finds no such device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_device_maps_that_cannot_be(folder, device_map, message):
    with pytest.raises(ValueError, match=message):
        DiffEdit.from_pretrained(folder, device_map=device_map)


def test_words_of_loading_that_ask_for_nothing(folder):
    nothing = {"trust_remote_code": False, "quantization_config": None, "use_onnx": False, "proxies": None}
    assert DiffEdit.from_pretrained(folder, **nothing).device.type == "cpu"
    with pytest.raises(ValueError, match="custom_pipeline='x': the code of a repository is never run"):
        DiffEdit.from_pretrained(folder, custom_pipeline="x")


SWITCHES = [
    ("enable_attention_slicing", ()),
    ("enable_attention_slicing", ("max",)),
    ("disable_attention_slicing", ()),
    ("set_attention_slice", (2,)),
    ("enable_xformers_memory_efficient_attention", ()),
    ("disable_xformers_memory_efficient_attention", ()),
]


@pytest.mark.parametrize("name, arguments", SWITCHES)
def test_switches_without_effect_say_so(pipe, caplog, name, arguments):
    caplog.set_level(logging.INFO, "joyedit")
    assert getattr(pipe, name)(*arguments) is None
    assert "joyedit.ops.attention" in caplog.records[-1].getMessage()


def test_adapters_of_a_pipeline(pipe, layers, tmp_path):
    path = pipe.save_lora_weights(tmp_path, unet_lora_layers=layers["unet"])
    x = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 4, pipe.unet.config.context_dim)
    plain = pipe.unet(*x).sample
    pipe.load_lora_weights(path, adapter_name="ink")
    adapted = pipe.unet(*x).sample
    assert not torch.equal(adapted, plain)
    pipe.disable_lora()
    assert torch.equal(pipe.unet(*x).sample, plain)
    pipe.enable_lora()
    assert torch.equal(pipe.unet(*x).sample, adapted)
    assert (pipe.fused_loras, pipe.num_fused_loras) == (set(), 0)
    pipe.fuse_lora(lora_scale=1.0)
    assert (pipe.fused_loras, pipe.num_fused_loras) == ({"ink"}, 1)
    pipe.unfuse_lora(components=["unet"])
    pipe.delete_adapters("ink")
    assert pipe.get_list_adapters() == {} and torch.equal(pipe.unet(*x).sample, plain)


METADATA = {"r": 3, "lora_alpha": 6, "target_modules": {"to_q", "to_k"}, "rank_pattern": {}}


def test_a_class_saves_layers_as_the_reference_does(layers, tmp_path):
    words = {
        "unet_lora_layers": layers["unet"],
        "text_encoder_lora_layers": layers["text_encoder"],
        "unet_lora_adapter_metadata": {**METADATA, "target_modules": ["to_k", "to_q"]},
    }
    path = DiffEdit.save_lora_weights(save_directory=tmp_path / "ours", safe_serialization=True, **words)
    diffusers.StableDiffusionDiffEditPipeline.save_lora_weights(tmp_path / "theirs", **words)
    assert path == tmp_path / "ours" / "pytorch_lora_weights.safetensors"
    other = tmp_path / "theirs" / path.name
    ours, expected = load_file(path), load_file(other)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    with safe_open(path, "pt") as one, safe_open(other, "pt") as two:
        assert one.metadata() == two.metadata()


def test_sets_in_the_metadata(layers, tmp_path):
    path = DiffEdit.save_lora_weights(
        tmp_path, unet_lora_layers=layers["unet"], unet_lora_adapter_metadata=METADATA
    )
    *_, metadata = DiffEdit.lora_state_dict(path, return_lora_metadata=True)
    assert metadata["unet.target_modules"] == ["to_k", "to_q"] and metadata["unet.lora_alpha"] == 6


def test_layers_may_be_a_module(layers, tmp_path):
    module = torch.nn.Module()
    module.lora_A = torch.nn.Linear(3, 2, bias=False)
    path = joyedit.JoyImageEditPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=module, weight_name="mine.safetensors"
    )
    assert path.name == "mine.safetensors"
    assert load_file(path).keys() == {"transformer.lora_A.weight"}


def test_saving_nothing_or_in_another_way_is_refused(layers, tmp_path, pipe):
    with pytest.raises(ValueError, match="there is nothing to save"):
        DiffEdit.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="a class holds no adapters"):
        DiffEdit.save_lora_weights(tmp_path, "ink", unet_lora_layers=layers["unet"])
    with pytest.raises(ValueError, match="safe_serialization=False"):
        DiffEdit.save_lora_weights(tmp_path, unet_lora_layers=layers["unet"], safe_serialization=False)
    with pytest.raises(TypeError, match=r"\['transformer_lora_layers'\]; accepted"):
        DiffEdit.save_lora_weights(tmp_path, transformer_lora_layers=layers["unet"])
    with pytest.raises(ValueError, match="are the settings of layers, and there are no layers"):
        pipe.save_lora_weights(tmp_path, unet_lora_adapter_metadata=METADATA)
    assert not any(tmp_path.iterdir())


def test_lora_state_dicts_are_those_of_the_reference(layers, tmp_path):
    words = {"unet_lora_layers": layers["unet"], "unet_lora_adapter_metadata": {"r": 3, "lora_alpha": 6}}
    DiffEdit.save_lora_weights(tmp_path, **words)
    theirs = diffusers.StableDiffusionDiffEditPipeline
    for options in ({}, {"return_lora_metadata": True}):
        found, expected = (kind.lora_state_dict(tmp_path, **options) for kind in (DiffEdit, theirs))
        assert len(found) == len(expected) and found[1:] == tuple(expected[1:])
        assert found[0].keys() == expected[0].keys()
        assert all(torch.equal(found[0][key], expected[0][key]) for key in found[0])
    state = joyedit.JoyImageEditPipeline.lora_state_dict(tmp_path)
    assert state.keys() == found[0].keys()


@pytest.mark.parametrize("name", PIPELINES)
def test_every_public_name_is_here_or_named(name):
    """Names that a later release of the reference adds fail here too."""
    ours = joyedit.load(TINY[name], device="cpu")
    for public in sorted(n for n in dir(getattr(diffusers, name)) if not n.startswith("_")):
        try:
            getattr(ours, public)
        except NotHereError as error:
            assert not hasattr(ours, public) and len(str(error)) > 30
    with pytest.raises(AttributeError, match="object has no attribute 'nothing'"):
        ours.nothing  # noqa: B018


def test_documented_class_methods_that_are_not_here():
    with pytest.raises(
        NotHereError, match="StableDiffusionDiffEditPipeline has no download: from_pretrained"
    ):
        DiffEdit.download("somebody/model")
    assert not hasattr(DiffEdit, "download") and not hasattr(joyedit.load("tiny-diffedit"), "download")


def test_a_property_that_fails_says_so_itself(pipe):
    class Own(DiffEdit):
        @property
        def broken(self):
            return self.lost_inside

    with pytest.raises(AttributeError, match="lost_inside"):
        Own(**pipe.components, requires_safety_checker=False).broken  # noqa: B018
