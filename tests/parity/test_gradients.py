"""Gradients of the denoisers against diffusers', and of adapters against PEFT's, with blocks that are kept
and with blocks that are computed once more."""

import copy

import pytest
import torch
from diffusers import ChronoEditTransformer3DModel as ReferenceChronoEdit
from diffusers import JoyImageEditTransformer3DModel as ReferenceJoyImage
from diffusers import UNet2DConditionModel as ReferenceUNet
from peft import LoraConfig, inject_adapter_in_model

from joyedit.lora import Adapters
from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel
from joyedit.models.clip import CLIPTextModel
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionModel
from tests.lora_layers import JOY, UNET, WAN, filled
from tests.parity.same_weights import difference, with_weights_of

TIMES = torch.tensor([501.0, 20.0])


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def joy_inputs():
    return drawn(2, 2, 16, 1, 6, 10, seed=1), TIMES, drawn(2, 5, 20, seed=2)


def wan_inputs():  # of the reference, the prompt is the last 512 tokens
    return drawn(2, 6, 2, 4, 6, seed=1), TIMES, drawn(2, 512, 10, seed=2), drawn(2, 3, 14, seed=3)


def unet_inputs():
    return drawn(2, 4, 7, 9, seed=1), TIMES, drawn(2, 5, 12, seed=2)


CASES = {  # prefix of adapters, reference, ours, config, inputs, layers of attention
    "joyimage": (
        "transformer",
        ReferenceJoyImage,
        JoyImageEditTransformer3DModel,
        {**JOY, "num_layers": 3},
        joy_inputs,
        ["img_attn_qkv", "txt_attn_qkv", "img_attn_proj", "txt_attn_proj"],
    ),
    "chronoedit": (
        "transformer",
        ReferenceChronoEdit,
        ChronoEditTransformer3DModel,
        {**WAN, "num_layers": 3},
        wan_inputs,
        ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"],
    ),
    "stable-diffusion": (
        "unet",
        ReferenceUNet,
        UNet2DConditionModel,
        UNET,
        unet_inputs,
        ["to_q", "to_k", "to_v", "to_out.0"],
    ),
}


@pytest.fixture(
    params=["joyimage", *(pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[1:])]
)
def case(request):
    """Reference and ours of the same random weights in float64, so that what differs is no rounding, and
    their inputs."""
    prefix, reference_class, ours_class, config, inputs, layers = CASES[request.param]
    torch.manual_seed(0)
    reference = filled(reference_class.from_config(config))
    ours = with_weights_of(reference, ours_class)
    ours.load_state_dict({name: tensor.clone() for name, tensor in ours.state_dict().items()}, assign=True)
    given = [x.double() if x is not TIMES else x for x in inputs()]
    return prefix, reference.double(), ours.double(), given, layers


def gradients(network, given, trained):
    for p in trained:
        p.grad = None
    out = network(*given)[0]
    (out.sin() * torch.arange(out.numel(), dtype=out.dtype).view(out.shape).cos()).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]


def equal_but_for_nothing(found, wanted):
    """Largest difference over all, relative to each tensor's own; what the softmax cannot see is nothing."""
    scale = max(w.abs().max() for w in wanted)
    assert all(f.abs().max() <= 1e-9 * scale for f, w in zip(found, wanted, strict=True) if not w.any())
    return max(difference(f, w) for f, w in zip(found, wanted, strict=True) if w.abs().max() > 1e-10 * scale)


def test_gradients_equal_the_references_with_and_without_recomputing(case):
    _, reference, ours, given, _ = case
    reference.requires_grad_(True)
    ours.requires_grad_(True)
    theirs = dict(reference.named_parameters())
    names = [name for name, _ in ours.named_parameters()]
    mine = list(ours.parameters())
    wanted = gradients(reference, given, [theirs[name] for name in names])
    found = gradients(ours, given, mine)
    assert equal_but_for_nothing(found, wanted) < 1e-5
    ours.enable_gradient_checkpointing()
    assert ours.is_gradient_checkpointing
    calls = []
    hooks = [m.register_forward_pre_hook(lambda m, args: calls.append(m)) for m in ours.modules()]
    again = gradients(ours, given, mine)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(a, f) for a, f in zip(again, found, strict=True))
    assert len(calls) > 1.5 * len(set(calls))  # what is inside of blocks was called twice


@pytest.mark.slow
def test_adapters_gradients_equal_pefts_with_and_without_recomputing(case):
    prefix, reference, ours, given, layers = case
    settings = LoraConfig(r=3, lora_alpha=6, target_modules=layers, init_lora_weights=False)
    inject_adapter_in_model(settings, reference)
    reference.double()
    theirs = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    made = Adapters({prefix: ours}).add_lora(3, alpha=6)
    assert len(made) == len(theirs) > 0
    pairs = {n: theirs[n.removeprefix(f"{prefix}.").replace(".weight", ".default.weight")] for n in made}
    for name, p in made.items():
        p.data = pairs[name].data.clone()
    wanted = gradients(reference, given, list(pairs.values()))
    plain = ours(*given)[0]
    assert difference(plain, reference(*given)[0]) < 1e-5
    found = gradients(ours, given, list(made.values()))
    assert equal_but_for_nothing(found, wanted) < 1e-5
    ours.enable_gradient_checkpointing()
    again = gradients(ours, given, list(made.values()))
    assert all(torch.equal(a, f) for a, f in zip(again, found, strict=True))


def test_recomputing_ends_and_is_copied(case):
    _, _, ours, given, _ = case
    plain = ours(*given)[0]
    ours.enable_gradient_checkpointing()
    other = copy.deepcopy(ours)
    ours.disable_gradient_checkpointing()
    assert not ours.is_gradient_checkpointing and other.is_gradient_checkpointing
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    other.requires_grad_(True)
    assert difference(other(*given)[0], plain) < 1e-9  # of its own weights


def test_encoders_have_no_blocks_for_it():
    text = CLIPTextModel.from_config(
        dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="CLIPTextModel has no blocks for it"):
        text.enable_gradient_checkpointing()
