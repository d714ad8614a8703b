"""Adapters that are written: in whose names, and read back equal; from file to file, without a checkpoint."""

import itertools
import json

import pytest
import torch
from diffusers import UNet2DConditionModel as ReferenceUNet
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin, WanLoraLoaderMixin
from safetensors.torch import load_file, save_file

from joyedit.checkpoints.lora_files import METADATA_KEY
from joyedit.checkpoints.safetensors_files import safetensors_header
from joyedit.command import cli
from joyedit.loading.adapters import convert_lora
from joyedit.lora import STATE, Adapters
from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel
from joyedit.models.clip import CLIPTextModel
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionModel
from tests.lora_layers import JOY, TEXT, UNET, WAN, factors, filled
from tests.parity.same_weights import difference

LAYOUTS = ("comfyui", "diffusers", "kohya")


def networks_of(system):
    made = {
        "joyimage": lambda: {"transformer": JoyImageEditTransformer3DModel.from_config(JOY)},
        "chronoedit": lambda: {"transformer": ChronoEditTransformer3DModel.from_config(WAN)},
        "stable-diffusion": lambda: {
            "unet": UNet2DConditionModel.from_config(UNET),
            "text_encoder": CLIPTextModel.from_config(TEXT),
        },
    }[system]()
    return {name: filled(network) for name, network in made.items()}


NAMES = {  # system -> layout -> a layer's ends
    "joyimage": {
        "comfyui": ("diffusion_model.double_blocks.1.attn.img_attn_qkv", "lora_A.weight", "lora_B.weight"),
        "diffusers": ("transformer.double_blocks.1.attn.img_attn_qkv", "lora_A.weight", "lora_B.weight"),
        "kohya": ("lora_unet_double_blocks_1_attn_img_attn_qkv", "lora_down.weight", "lora_up.weight"),
    },
    "chronoedit": {
        "comfyui": ("diffusion_model.blocks.1.self_attn.q", "lora_A.weight", "lora_B.weight"),
        "diffusers": ("transformer.blocks.1.attn1.to_q", "lora_A.weight", "lora_B.weight"),
        "kohya": ("lora_unet_blocks_1_self_attn_q", "lora_down.weight", "lora_up.weight"),
    },
    "stable-diffusion": {
        "comfyui": (
            "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q",
            "lora_down.weight",
            "lora_up.weight",
        ),
        "diffusers": (
            "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
            "lora_A.weight",
            "lora_B.weight",
        ),
        "kohya": (
            "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q",
            "lora_down.weight",
            "lora_up.weight",
        ),
    },
}


slow = pytest.mark.slow
PAIRS = [("joyimage", to) for to in LAYOUTS] + [("chronoedit", "comfyui")]
PAIRS += [pytest.param(*p, marks=slow) for p in itertools.product(NAMES, LAYOUTS) if p not in PAIRS]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained(networks, **options):
    """An adapter whose factors are something."""
    adapters = Adapters(networks)
    made = adapters.add_lora(3, **options)
    with torch.no_grad():
        for factor in made.values():
            factor.normal_(std=0.2)
    return adapters, made


def deltas(networks):
    """(network, tensor) -> what the one adapter adds there, its parts as they are."""
    found = {}
    for name, network in networks.items():
        for changes in network.__dict__[STATE].loaded.values():
            for tensor, several in changes.items():
                found[name, tensor] = [
                    (d.down.flatten(1), None if d.up is None else d.up.flatten(1), d.scale) for d in several
                ]
    return found


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for place, parts in wanted.items():
        assert len(found[place]) == len(parts), place
        for (down, up, scale), (a, b, s) in zip(found[place], parts, strict=True):
            assert torch.equal(down, a) and (up is None) == (b is None), place
            assert up is None or torch.equal(up, b), place
            assert scale == pytest.approx(s, rel=1e-7), place


@pytest.mark.parametrize("alpha", [None, 7])
@pytest.mark.parametrize(("system", "to"), PAIRS)
def test_what_is_written_is_read_back_equal_under_the_names_of_others(system, to, alpha, tmp_path):
    networks = networks_of(system)
    adapters, made = trained(networks, alpha=alpha, targets="all")
    path = adapters.save_lora(tmp_path / "mine.safetensors", to=to, base="small@1", trigger="in ink")
    stored, header = load_file(path), safetensors_header(path)["__metadata__"]
    layer, down, up = NAMES[system][to]
    assert stored[f"{layer}.{down}"].dtype == torch.float32 and f"{layer}.{up}" in stored
    assert (f"{layer}.alpha" in stored) == ("lora_down" in down or (alpha is not None and to != "diffusers"))
    assert header["joyedit.base"] == "small@1" and header["modelspec.trigger_phrase"] == "in ink"
    if to == "diffusers":
        network = next(iter(networks))
        settings = json.loads(header[METADATA_KEY])
        assert (settings[f"{network}.r"], settings[f"{network}.lora_alpha"]) == (3, alpha or 3)
    else:
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("3", str(alpha or 3))
    others = networks_of(system)
    assert not Adapters(others).load_lora_weights(path).unmatched
    assert_equal(deltas(others), deltas(networks))


def test_without_a_word_it_is_what_comfyui_reads(tmp_path):
    for system in NAMES:
        adapters, _ = trained(networks_of(system))
        keys = load_file(adapters.save_lora(tmp_path / f"{system}.safetensors"))
        layer, down, _ = NAMES[system]["comfyui"]
        assert f"{layer}.{down}" in keys
        architecture = safetensors_header(tmp_path / f"{system}.safetensors")["__metadata__"]
        expected = {"joyimage": "joyai-image-edit/lora", "chronoedit": "chronoedit/lora"}.get(system)
        assert architecture.get("modelspec.architecture") == expected  # the small UNet is no release's


@pytest.mark.parametrize("system", ["joyimage", "chronoedit"])
def test_every_key_is_a_layer_of_comfyuis_own_file(system, tmp_path):
    """ComfyUI's generic rule: what stands before lora_A is a weight of the network, whose file has `model.`
    before it."""
    networks = networks_of(system)
    adapters, _ = trained(networks, targets="all")
    (network,) = networks.values()
    names = {"joyimage": "comfyui", "chronoedit": "comfyui"}[system]
    layout = next(one for one in network.layouts() if one.name == names)
    weights = set(layout.invert(network.state_dict()))
    keys = load_file(adapters.save_lora(tmp_path / "mine.safetensors"))
    layers = {key.rpartition(".lora_")[0] for key in keys}
    assert len(layers) > 20 and {f"model.{layer}.weight" for layer in layers} <= weights


def stranger(networks):
    """An adapter as files of others have it: several ranks, alphas here and there, whole differences."""
    state = {}
    for name, network in networks.items():
        linears = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
        for number, layer in enumerate(linears[:6]):
            down, up = factors(network, layer, 2 + number % 3)
            state |= {f"{name}.{layer}.lora_A.weight": down, f"{name}.{layer}.lora_B.weight": up}
            if number % 2:
                state[f"{name}.{layer}.alpha"] = torch.tensor(1.5)
        whole = next(n for n in linears[6:] if network.get_submodule(n).bias is not None)
        weight = network.get_submodule(whole).weight
        state[f"{name}.{whole}.diff"] = torch.randn(weight.shape)
        state[f"{name}.{whole}.diff_b"] = torch.randn(len(weight))
    if "transformer" in networks and "blocks.0.scale_shift_table" in networks["transformer"].state_dict():
        state["transformer.blocks.0.scale_shift_table.diff"] = torch.randn(1, 6, 24)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("system", NAMES)
def test_from_file_to_file_through_every_layout_and_back(system, tmp_path):
    networks = networks_of(system)
    source = tmp_path / "source.safetensors"
    save_file(stranger(networks), source, {"modelspec.trigger_phrase": "in ink", "format": "pt"})
    Adapters(networks).load_lora_weights(source)
    for number, to in enumerate(
        ("comfyui", "diffusers", "kohya", "diffusers", "comfyui", "kohya", "comfyui")
    ):
        target = tmp_path / f"{number}-{to}.safetensors"
        assert convert_lora(source, target, to) == target
        others = networks_of(system)
        assert not Adapters(others).load_lora_weights(target).unmatched
        assert_equal(deltas(others), deltas(networks))
        assert safetensors_header(target)["__metadata__"]["modelspec.trigger_phrase"] == "in ink"
        source = target
    first, last = load_file(tmp_path / "0-comfyui.safetensors"), load_file(source)
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)


@pytest.mark.slow
def test_convolutions_between_levels_by_the_original_codes_names(tmp_path):
    """Of the released UNet, whose first level going up has no transformers: the number of its upsampler is
    one less than those of the others."""
    state = {}
    for number, width in ((3, 320), (6, 640), (9, 1280)):
        state |= pair_of(f"lora_unet_input_blocks_{number}_0_op", width)
    for place, width in (("2_1", 1280), ("5_2", 1280), ("8_2", 640)):
        state |= pair_of(f"lora_unet_output_blocks_{place}_conv", width)
    save_file(state, tmp_path / "ldm.safetensors")
    made = load_file(convert_lora(tmp_path / "ldm.safetensors", tmp_path / "out.safetensors", "diffusers"))
    names = [f"down_blocks.{i}.downsamplers.0.conv" for i in range(3)]
    names += [f"up_blocks.{i}.upsamplers.0.conv" for i in range(3)]
    ends = {"lora_A": "lora_down", "lora_B": "lora_up"}
    assert made.keys() == {f"unet.{name}.{end}.weight" for name in names for end in ends}
    for name, key in zip(names, list(state)[::2], strict=True):
        for end, theirs in ends.items():
            wanted = state[f"{key.partition('.')[0]}.{theirs}.weight"]
            assert torch.equal(made[f"unet.{name}.{end}.weight"], wanted)


def pair_of(layer, width):
    return {
        f"{layer}.lora_down.weight": torch.randn(2, width, 3, 3),
        f"{layer}.lora_up.weight": torch.randn(width, 2, 1, 1),
    }


def test_a_factor_with_a_bias_becomes_a_difference_of_the_bias(tmp_path):
    networks = networks_of("joyimage")
    layer = "transformer.double_blocks.0.attn.img_attn_proj"
    state = {f"{layer}.lora_A.weight": torch.randn(2, 48), f"{layer}.lora_B.weight": torch.randn(48, 2)}
    state |= {f"{layer}.lora_B.bias": torch.randn(48), f"{layer}.alpha": torch.tensor(1.0)}
    state[f"{layer}.diff_b"] = torch.randn(48)
    save_file(state, tmp_path / "peft.safetensors")
    adapters = Adapters(networks)
    adapters.load_lora_weights(tmp_path / "peft.safetensors")
    convert_lora(tmp_path / "peft.safetensors", tmp_path / "comfyui.safetensors", "comfyui")
    adapters.save_lora(tmp_path / "saved.safetensors")
    others, saved = networks_of("joyimage"), networks_of("joyimage")
    Adapters(others).load_lora_weights(tmp_path / "comfyui.safetensors")
    Adapters(saved).load_lora_weights(tmp_path / "saved.safetensors")
    shifts = []
    for found in (networks, others, saved):
        module = found["transformer"].get_submodule(layer.partition(".")[2])
        shifts.append(module.bias - module._parameters["bias"])
    assert all(torch.allclose(one, shifts[0], atol=1e-6) for one in shifts) and shifts[0].abs().max() > 0.1


def run_unet(network):
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 7, 9, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return network(latents, torch.tensor([501, 20]), text).sample


@pytest.mark.slow
@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_diffusers_reads_what_is_written_for_stable_diffusion(to, tmp_path):
    ours = filled(UNet2DConditionModel.from_config(UNET))
    reference = ReferenceUNet.from_config(UNET)
    reference.load_state_dict(ours.state_dict())
    adapters, _ = trained({"unet": ours}, alpha=6)
    path = adapters.save_lora(tmp_path / "mine.safetensors", to=to)
    state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(path), return_lora_metadata=True
    )
    reference.load_lora_adapter(
        state, prefix="unet", network_alphas=alphas, adapter_name="mine", metadata=metadata
    )
    assert difference(run_unet(reference), run_unet(ours)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("to", LAYOUTS)
def test_diffusers_reads_what_is_written_for_chronoedit(to, tmp_path):
    from diffusers import ChronoEditTransformer3DModel as Reference

    ours = filled(ChronoEditTransformer3DModel.from_config(WAN))
    reference = Reference.from_config(WAN)
    reference.load_state_dict(ours.state_dict())
    adapters, _ = trained({"transformer": ours}, alpha=6, targets=r"^blocks\.")  # its reader wants ffn, too
    path = adapters.save_lora(tmp_path / "mine.safetensors", to=to)
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    reference.load_lora_adapter(state, prefix="transformer", metadata=metadata, adapter_name="mine")
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(2, 6, 2, 4, 6, generator=generator),
        torch.tensor([501.0, 20.0]),
        torch.randn(2, 512, 10, generator=generator),
        torch.randn(2, 4, 14, generator=generator),
    ]
    assert difference(ours(*inputs).sample, reference(*inputs).sample) < 1e-5


def test_other_factors_may_be_written_in_place_of_the_live_ones(tmp_path):
    """Their average, in a training."""
    networks = networks_of("joyimage")
    adapters, made = trained(networks)
    average = {name: torch.full_like(p, 0.25) for name, p in made.items()}
    stored = load_file(adapters.save_lora(tmp_path / "mine.safetensors", factors=average))
    assert stored and all((tensor == 0.25).all() for tensor in stored.values())
    with pytest.raises(ValueError, match="factors: transformer.x.lora_A.weight is no factor of 'default'"):
        adapters.save_lora(
            tmp_path / "no.safetensors", factors={"transformer.x.lora_A.weight": torch.ones(1)}
        )
    with pytest.raises(ValueError, match="to='peft': adapters are written as comfyui, diffusers, kohya"):
        adapters.save_lora(tmp_path / "no.safetensors", to="peft")
    assert not (tmp_path / "no.safetensors").exists()


@pytest.fixture
def source(tmp_path):
    networks = networks_of("joyimage")
    return trained(networks)[0].save_lora(tmp_path / "source.safetensors", trigger="in ink")


def test_the_command_converts_an_adapter(source, tmp_path, capsys):
    target = tmp_path / "made.safetensors"
    assert cli.main(["convert", str(source), str(target), "--to", "kohya"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert "lora_unet_double_blocks_0_attn_img_attn_qkv.lora_down.weight" in load_file(target)
    before = target.read_bytes()
    assert cli.main(["convert", str(source), str(target), "--to", "diffusers"]) == 1
    assert "exists" in capsys.readouterr().err and target.read_bytes() == before
    assert cli.main(["convert", str(source), str(target), "--to", "diffusers", "--force"]) == 0
    assert "transformer.double_blocks.0.attn.img_attn_qkv.lora_A.weight" in load_file(target)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("folder", "--to", "kohya"), "an adapter is written to a file, whose name ends in .safetensors"),
        (("source.safetensors", "--to", "kohya"), "are the same file"),
        (("a.safetensors", "--to", "original"), "--to takes comfyui, diffusers or kohya"),
        (("a.safetensors", "--dtype", "bf16"), "is an adapter, which --dtype is not for"),
    ],
)
def test_the_command_refuses(source, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", source.name, *words]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param(
            {"transformer.single_blocks.0.x.lora_A.weight": 1},
            "looks like an adapter of FLUX or HunyuanVideo",
            marks=slow,
        ),
        (
            {"double_blocks.0.img_attn_qkv.hada_w1_a": 1, "double_blocks.0.attn.img_attn_qkv.alpha": 1},
            "is LoHa",
        ),
        (
            {"double_blocks.0.attn.img_attn_qkv.lora_A.weight": 1, "extra.lora_A.weight": 1},
            "1 keys name no layer",
        ),
        ({"double_blocks.99999.attn.img_attn_qkv.lora_A.weight": 1}, "speaks of block 99999"),
    ],
)
def test_what_is_not_known_is_refused_by_name(state, message, tmp_path):
    save_file({key: torch.ones(2, 2) for key in state}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert not (tmp_path / "b.safetensors").exists()


def test_of_a_checkpoint_kohya_has_no_names(tmp_path, capsys):
    assert cli.main(["convert", "tiny-joyimage", str(tmp_path / "made"), "--to", "kohya"]) == 1
    assert "--to kohya is for adapters" in capsys.readouterr().err
