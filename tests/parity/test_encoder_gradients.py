"""Gradients of the encoders against transformers'. A training here leaves them as they are; a fork need not.

Their gradients go through the same key table as their weights, so that a parameter of ours has that of its
own.
"""

import copy

import pytest
import torch
from transformers import CLIPTextConfig as TheirTextConfig
from transformers import CLIPTextModel as TheirText
from transformers import CLIPVisionConfig as TheirVisionConfig
from transformers import CLIPVisionModelWithProjection as TheirVision
from transformers import UMT5EncoderModel as TheirUMT5

from joyedit.models.clip import CLIPTextModel, CLIPVisionModelWithProjection
from joyedit.models.qwen3_vl import Qwen3VLForConditionalGeneration
from joyedit.models.umt5 import UMT5EncoderModel
from tests.parity import test_clip, test_qwen3_vl, test_umt5
from tests.parity.same_weights import difference, with_weights_of


def umt5():
    torch.manual_seed(0)
    theirs = test_umt5.randomise(TheirUMT5(test_umt5.their_config("wide")))
    ids, mask = test_umt5.prompts(theirs, (7, 19))

    def run(network):
        found = network.encode(ids, mask) if isinstance(network, UMT5EncoderModel) else network(ids, mask)[0]
        return [found[mask.bool()]]

    return theirs, UMT5EncoderModel, run


def clip_text(name):
    theirs = test_clip.randomise(TheirText(TheirTextConfig(**test_clip.TEXT[name])))
    ids = test_clip.prompts(name, (3, 7))

    def run(network):
        found = network(ids)
        return [found.last_hidden_state, found.pooler_output]

    return theirs, CLIPTextModel, run


def clip_vision(name):
    theirs = test_clip.randomise(TheirVision(TheirVisionConfig(**test_clip.VISION[name])))
    torch.manual_seed(0)
    pixels = test_clip.pictures(theirs)

    def run(network):
        if isinstance(network, CLIPVisionModelWithProjection):
            return [network(pixels.to(network.dtype)).image_embeds, network.hidden_states(pixels, -2)]
        found = network(pixels.to(network.dtype), output_hidden_states=True)
        return [found.image_embeds, found.hidden_states[-2]]

    return theirs, CLIPVisionModelWithProjection, run


def qwen3_vl(shape):
    """Both towers, and the way from the pictures into the first layers of the words."""
    torch.manual_seed(0)
    theirs = copy.deepcopy(test_qwen3_vl.their_model(shape))
    inputs = test_qwen3_vl.make_inputs(shape, *test_qwen3_vl.PROMPTS["batch"])
    kept = inputs["attention_mask"].bool()
    marks = (inputs["input_ids"] == test_qwen3_vl.IMAGE).int()

    def run(network):
        if isinstance(network, Qwen3VLForConditionalGeneration):
            return [network(**inputs).logits[kept]]
        return [network(**inputs, mm_token_type_ids=marks).logits[kept]]

    return theirs, Qwen3VLForConditionalGeneration, run


CASES = {
    "umt5": umt5,
    "clip text": lambda: clip_text("sd1"),
    "clip text, gelu": lambda: clip_text("sd2"),
    "clip vision": lambda: clip_vision("exact"),
    "clip vision, a rim": lambda: clip_vision("quick"),
    "qwen3-vl": lambda: qwen3_vl("small"),
    "qwen3-vl, other heads": lambda: qwen3_vl("heads"),
}


def gradients(network, run):
    """Of every parameter, by name."""
    network.requires_grad_(True)
    total = sum(
        (out.sin() * torch.arange(out.numel(), dtype=out.dtype).view(out.shape).cos()).sum()
        for out in run(network)
    )
    total.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in network.named_parameters()}


QUICK = ("umt5", "clip text", "clip vision")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_gradients_equal_the_references(name):
    theirs, kind, run = CASES[name]()
    ours = with_weights_of(theirs, kind)
    ours.load_state_dict({n: t.clone() for n, t in ours.state_dict().items()}, assign=True)
    theirs, ours = theirs.double(), ours.double()  # what differs is the rounding of islands in fp32
    found = gradients(ours, run)
    of_theirs = gradients(theirs, run)
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            parameter.copy_(of_theirs[parameter_name])
    wanted = dict(with_weights_of(theirs.float(), kind).named_parameters())
    assert found.keys() == wanted.keys()
    scale = max(tensor.abs().max() for tensor in wanted.values())
    unseen = {n for n, tensor in wanted.items() if tensor.abs().max() <= 1e-9 * scale}
    assert all(n.endswith("k_proj.bias") for n in unseen)  # of which the softmax knows nothing
    assert all(found[n].abs().max() <= 1e-9 * scale for n in unseen)
    assert max(difference(found[n], wanted[n]) for n in found.keys() - unseen) < 1e-5
