"""LoRA at work: unfused and fused runs, several adapters, dtypes, saving, and what is refused."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from joyedit.checkpoints.network import load_network
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.lora import Adapters
from joyedit.memory import BlockStreaming, visit
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionModel
from tests.lora_layers import (
    ATTENTION,
    JOY,
    JOY_LAYERS,
    UNET,
    assert_changed_by,
    factors,
    filled,
    joined,
    product,
    snapshot,
)


@pytest.fixture
def unet():
    return filled(UNet2DConditionModel.from_config(UNET))


@pytest.fixture
def joy():
    return filled(JoyImageEditTransformer3DModel.from_config(JOY))


def run_unet(network, seed=1):
    generator = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(2, 4, 7, 9, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return network(latents, torch.tensor([501, 20]), text).sample


def run_joy(network):
    """With the last block's slices of weights, as an edit runs it."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 2, 16, 1, 6, 10, generator=generator)
    text, grid = torch.randn(1, 4, 20, generator=generator), network.token_grid(latents)
    img = network.embed_image(latents)
    vec = network.embed_time(torch.tensor([300.0]))
    target, reference = img.chunk(2, dim=1)
    return network.predict_target(target, reference, network.embed_text(text), vec, network.rope(grid), grid)


def lora(network, prefix, layers, rank=3, size=0.3):
    state = {}
    for layer in layers:
        down, up = factors(network, layer, rank, size)
        state |= {f"{prefix}.{layer}.lora_A.weight": down, f"{prefix}.{layer}.lora_B.weight": up}
    return state


def linear_and_conv(network):
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return [name for name, module in network.named_modules() if isinstance(module, kinds)]


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


CASES = {"unet": ("unet", run_unet), "joy": ("transformer", run_joy)}


@pytest.mark.parametrize("name", CASES)
def test_unfused_runs_equal_fused_ones_and_unloading_restores(name, request):
    prefix, run = CASES[name]
    network = request.getfixturevalue(name)
    adapters = Adapters({prefix: network})
    before, plain = snapshot(network), run(network)
    first, second = (lora(network, prefix, linear_and_conv(network), rank) for rank in (2, 5))
    adapters.load_lora_weights(first, "first")
    adapters.load_lora_weights(second, "second")
    assert adapters.get_active_adapters() == ["second"]
    adapters.set_adapters(["first", "second"], [0.7, -0.4])
    running = run(network)
    assert (running - plain).abs().max() > 1e-2
    assert_changed_by(network, before, {})

    adapters.fuse_lora()
    assert adapters.fused_loras == {"first", "second"}
    assert difference(run(network), running) < 1e-5
    wanted = {}
    for layer in linear_and_conv(network):
        keys = f"{prefix}.{layer}.lora_A.weight", f"{prefix}.{layer}.lora_B.weight"
        both = 0.7 * product(*(first[key] for key in keys)) - 0.4 * product(*(second[key] for key in keys))
        wanted[f"{layer}.weight"] = both
    assert_changed_by(network, before, wanted)
    assert all(
        type(m).__name__ in ("Linear", "Conv2d", "PatchEmbed", "TokenConv2d")
        for m in network.modules()
        if hasattr(m, "in_features") or hasattr(m, "kernel_size")
    )

    adapters.unfuse_lora()
    assert_changed_by(network, before, {})
    assert torch.equal(run(network), running)
    adapters.unload_lora_weights()
    assert adapters.get_list_adapters() == {} and torch.equal(run(network), plain)
    assert_changed_by(network, before, {})


def test_strengths_of_a_call_and_of_adapters(unet):
    adapters = Adapters({"unet": unet})
    plain = run_unet(unet)
    adapters.load_lora_weights(lora(unet, "unet", ATTENTION), "style")
    full = run_unet(unet)
    results = {}
    for weight in (0.5, 0.25):
        adapters.set_adapters(["style"], weight)
        results[weight] = run_unet(unet)
    adapters.set_adapters("style")
    with adapters.scaled(0.5):
        assert torch.equal(run_unet(unet), results[0.5])
        with adapters.scaled(0.5):
            assert torch.equal(run_unet(unet), results[0.25])
        assert torch.equal(run_unet(unet), results[0.5])
    assert torch.equal(run_unet(unet), full)
    with adapters.scaled(0.0):
        assert torch.equal(run_unet(unet), plain)
    with pytest.raises(RuntimeError), adapters.scaled(0.5):
        raise RuntimeError
    assert torch.equal(run_unet(unet), full)
    adapters.disable_lora()
    assert torch.equal(run_unet(unet), plain)
    adapters.enable_lora()
    assert torch.equal(run_unet(unet), full)


def test_adapters_of_several_networks(unet, joy):
    adapters = Adapters({"unet": unet, "transformer": joy})
    both = lora(unet, "unet", ATTENTION) | lora(joy, "transformer", JOY_LAYERS)
    adapters.load_lora_weights(both, "both")
    adapters.load_lora_weights(lora(joy, "transformer", JOY_LAYERS[:1]), "one")
    assert adapters.get_list_adapters() == {"unet": ["both"], "transformer": ["both", "one"]}
    assert adapters.get_active_adapters() == ["one"]
    plain = run_unet(copy.deepcopy(unet))
    adapters.set_adapters(["one", "both"], [None, {"unet": 0.0}])
    assert torch.equal(run_unet(unet), plain)
    assert Adapters({"transformer": joy}).get_list_adapters() == {"transformer": ["both", "one"]}
    adapters.fuse_lora(components=["transformer"], adapter_names=["both"])
    assert adapters.fused_loras == {"both"}
    with pytest.raises(ValueError, match=r"\['both'\] are fused already"):
        adapters.fuse_lora(adapter_names=["both"])
    with pytest.raises(ValueError, match="are fused: unfuse_lora"):
        adapters.delete_adapters("both")
    adapters.unfuse_lora()
    adapters.delete_adapters(["both"])
    assert adapters.get_list_adapters() == {"transformer": ["one"]}
    adapters.delete_adapters("one")
    with pytest.raises(ValueError, match="components=.'vae'.: adapters go into"):
        adapters.fuse_lora(components=["vae"])


def test_fusing_one_after_the_other_is_fusing_both(unet):
    adapters = Adapters({"unet": unet})
    for name in ("a", "b"):
        adapters.load_lora_weights(lora(unet, "unet", ATTENTION), name)
    adapters.set_adapters(["a", "b"], [0.3, 0.9])
    before = snapshot(unet)
    adapters.fuse_lora()
    together = snapshot(unet)
    adapters.unfuse_lora()
    adapters.fuse_lora(adapter_names=["a"])
    adapters.fuse_lora(adapter_names=["b"])
    assert all(torch.equal(tensor, together[name]) for name, tensor in unet.state_dict().items())
    adapters.unfuse_lora()
    assert_changed_by(unet, before, {})


def test_fused_weights_survive_unloading(unet, tmp_path):
    adapters = Adapters({"unet": unet})
    adapters.load_lora_weights(lora(unet, "unet", ATTENTION))
    adapters.fuse_lora()
    fused = snapshot(unet)
    adapters.unload_lora_weights()
    unet.save_pretrained(tmp_path)
    saved = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, fused[name]) for name, tensor in saved.state_dict().items())
    assert adapters.fused_loras == set()


def test_fuse_without_originals_cannot_be_undone(unet):
    adapters = Adapters({"unet": unet})
    adapters.load_lora_weights(lora(unet, "unet", ATTENTION))
    running = run_unet(unet)
    adapters.fuse_lora(reversible=False)
    assert difference(run_unet(unet), running) < 1e-5
    with pytest.raises(ValueError, match="the original weights are gone"):
        adapters.unfuse_lora()


def test_safe_fusing_changes_nothing_when_a_weight_overflows(unet):
    adapters = Adapters({"unet": unet})
    state = lora(unet, "unet", ATTENTION)
    state[f"unet.{ATTENTION[1]}.lora_A.weight"][0, 0] = float("inf")
    adapters.load_lora_weights(state)
    before = snapshot(unet)
    with pytest.raises(ValueError, match=f"{re.escape(ATTENTION[1])}.weight would not be finite"):
        adapters.fuse_lora(safe_fusing=True)
    assert_changed_by(unet, before, {})


def test_half_precision_weights_are_rounded_once_and_fp32_ones_stay(joy):
    joy.to(torch.bfloat16)
    adapters = Adapters({"transformer": joy})
    state = lora(joy, "transformer", JOY_LAYERS)
    adapters.load_lora_weights(state)
    before = snapshot(joy)
    dtypes = {name: tensor.dtype for name, tensor in before.items()}
    adapters.fuse_lora()
    assert {name: tensor.dtype for name, tensor in joy.state_dict().items()} == dtypes
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    for layer in JOY_LAYERS:
        name = f"{layer}.weight"
        keys = f"transformer.{layer}.lora_A.weight", f"transformer.{layer}.lora_B.weight"
        truth = before[name].double() + product(*(state[key] for key in keys)).reshape(before[name].shape)
        stored = joy.state_dict()[name]
        unit = torch.finfo(stored.dtype).eps * truth.abs() + 1e-6
        assert ((stored.double() - truth).abs() <= 0.51 * unit).all()
    adapters.unfuse_lora()
    assert_changed_by(joy, before, {})


def test_an_adapted_network_moves_saves_and_copies_as_itself(joy, tmp_path):
    adapters = Adapters({"transformer": joy})
    before = snapshot(joy)
    adapters.load_lora_weights(lora(joy, "transformer", JOY_LAYERS))
    running = run_joy(joy)
    assert list(joy.state_dict()) == list(before) == [name for name, _ in joy.named_parameters()]
    joy.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())
    assert torch.equal(run_joy(copy.deepcopy(joy)), running)
    joy.load_state_dict(before)
    assert torch.equal(run_joy(joy), running)
    joy.to(torch.bfloat16)
    assert joy.dtype == torch.bfloat16
    assert joy.double_blocks[1].attn.img_attn_qkv.weight.dtype == torch.bfloat16
    assert joy.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert 1e-6 < (run_joy(joy) - running).abs().max() < 0.1


def test_streamed_blocks_see_their_adapters(joy):
    adapters = Adapters({"transformer": joy})
    adapters.load_lora_weights(lora(joy, "transformer", JOY_LAYERS))
    running = run_joy(joy)
    adapters.fuse_lora()
    fused = run_joy(joy)
    adapters.unfuse_lora()
    BlockStreaming.attach(joy, torch.device("cpu"))
    for fuse in (False, True):
        if fuse:
            adapters.fuse_lora()
        with visit(joy, None):
            assert torch.equal(run_joy(joy), fused if fuse else running)
    BlockStreaming.detach(joy)
    adapters.unfuse_lora()
    assert torch.equal(run_joy(joy), running)


def test_originals_of_mapped_files_take_no_memory(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    file = TensorFiles([tmp_path / "diffusion_pytorch_model.safetensors"])
    mapped = load_network(UNet2DConditionModel, unet.config, file)
    name = f"{ATTENTION[0]}.weight"
    place = mapped.state_dict()[name].data_ptr()
    adapters = Adapters({"unet": mapped})
    adapters.load_lora_weights(lora(mapped, "unet", ATTENTION))
    adapters.fuse_lora()
    assert mapped.state_dict()[name].data_ptr() != place
    adapters.unfuse_lora()
    assert mapped.state_dict()[name].data_ptr() == place


def test_factors_can_be_trained_through_the_network(unet):
    state = lora(unet, "unet", ATTENTION)
    for tensor in state.values():
        tensor.requires_grad_(True)
    Adapters({"unet": unet}).load_lora_weights(state)
    run_unet(unet).square().mean().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in state.values())


@pytest.mark.parametrize("half", [False, True])
def test_saved_adapter_loads_equal(half, unet, tmp_path):
    state = {}
    for layer in linear_and_conv(unet):
        down, up = factors(unet, layer)
        base = f"lora_unet_{joined(layer)}"
        state |= {
            f"{base}.lora_down.weight": down,
            f"{base}.lora_up.weight": up,
            f"{base}.alpha": torch.tensor(2.0),
        }
    state = {key: tensor.half() if half else tensor for key, tensor in state.items()}
    adapters = Adapters({"unet": unet})
    adapters.load_lora_weights(state, "style")
    running = run_unet(unet)
    path = adapters.save_lora_weights(tmp_path)
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    saved = load_file(path)
    assert saved["unet.conv_in.lora_A.weight"].shape == (3, 4, 3, 3)
    assert saved["unet.conv_in.lora_B.weight"].shape == (16, 3, 1, 1)
    adapters.unload_lora_weights()
    adapters.load_lora_weights(tmp_path)
    assert (run_unet(unet) - running).abs().max() < 1e-5 * running.abs().max()


def test_save_given_layers(unet, tmp_path):
    adapters = Adapters({"unet": unet})
    with pytest.raises(ValueError, match="adapter_name: say which one"):
        adapters.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="nothing to save"):
        adapters.save_lora_weights(tmp_path, unet_lora_layers={})
    with pytest.raises(TypeError, match="transformer_lora_layers"):
        adapters.save_lora_weights(tmp_path, transformer_lora_layers={})
    layers = {
        f"{ATTENTION[0]}.lora_A.weight": torch.ones(2, 16),
        f"{ATTENTION[0]}.lora_B.weight": torch.ones(16, 2),
    }
    adapters.save_lora_weights(tmp_path, unet_lora_layers=layers)
    assert adapters.load_lora_weights(tmp_path).matched == {"unet": (f"{ATTENTION[0]}.weight",)}


def test_arguments_are_checked(unet):
    adapters = Adapters({"unet": unet})
    with pytest.raises(ValueError, match="no adapter is active"):
        adapters.fuse_lora()
    adapters.load_lora_weights(lora(unet, "unet", ATTENTION), "style")
    with pytest.raises(ValueError, match="adapter_name='style' is in use"):
        adapters.load_lora_weights(lora(unet, "unet", ATTENTION), "style")
    with pytest.raises(ValueError, match=r"no adapter is called \['other'\]; loaded are \['style'\]"):
        adapters.set_adapters(["style", "other"])
    with pytest.raises(ValueError, match="adapter_weights has 2 values for 1 adapters"):
        adapters.set_adapters("style", [1.0, 2.0])
    with pytest.raises(ValueError, match=r"\['dawn'\] is none of down, mid, up"):
        adapters.set_adapters("style", {"unet": {"dawn": 1.0}})
    with pytest.raises(ValueError, match="adapter_weights names .'text'"):
        adapters.set_adapters("style", {"text": 1.0})
    with pytest.raises(TypeError, match="unknown argument 'wieght_name'.*did you mean 'weight_name'"):
        adapters.load_lora_weights("nowhere", wieght_name="x")
    assert adapters.load_lora_weights(lora(unet, "unet", ATTENTION)).name == "default_0"
    assert adapters.load_lora_weights(lora(unet, "unet", ATTENTION)).name == "default_1"
