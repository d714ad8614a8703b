"""One block of each transformer at its published width: time, peak of memory, and the share of the dense bf16
peak of the device that is used.

The sizes are those of JoyImage at 1024 x 1024 pixels with one reference, and of ChronoEdit with 5 and with 29
frames of 720p. Operations are the model's, whatever a backward computes for a second time.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu.measuring import (
    META,
    normal,
    operations,
    or_why,
    random_network,
    share_of_peak,
    with_peak_bytes,
)
from benchmarks.gpu.setting import Row, Setting
from joyedit import ops
from joyedit.models.chronoedit_dit import ChronoEditConfig, ChronoEditTransformer3DModel
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel


class Case(NamedTuple):
    config: JoyImageEditConfig | ChronoEditConfig  # of one block
    grid: tuple[int, int, int]  # image tokens: frames, rows, columns
    text: int  # text tokens


class Block(NamedTuple):
    module: nn.Module
    forward: Callable[..., tuple[Tensor, ...]]  # streams -> the streams after it
    streams: tuple[Tensor, ...]


CLIP_TOKENS = 257
JOYIMAGE, CHRONOEDIT = JoyImageEditConfig(num_layers=1), ChronoEditConfig(num_layers=1)
CASES = {
    "joyimage, 9,292 tokens": Case(JOYIMAGE, (2, 64, 64), 1100),
    "chronoedit, 7,200 tokens": Case(CHRONOEDIT, (2, 45, 80), 512),
    "chronoedit, 28,800 tokens": Case(CHRONOEDIT, (8, 45, 80), 512),
}
TINY_JOYIMAGE = JOYIMAGE.replace(hidden_size=32, num_attention_heads=2, rope_dim_list=(4, 6, 6), text_dim=16)
TINY_CHRONOEDIT = CHRONOEDIT.replace(
    num_attention_heads=2,
    attention_head_dim=18,
    ffn_dim=48,
    text_dim=16,
    image_dim=16,
    added_kv_proj_dim=36,
)
TINY = {
    "joyimage, tiny": Case(TINY_JOYIMAGE, (2, 3, 4), 5),
    "chronoedit, tiny": Case(TINY_CHRONOEDIT, (2, 3, 4), 5),
}


def rows(setting: Setting) -> Iterator[Row]:
    for name, case in (TINY if setting.dry else CASES).items():
        for backend in (setting.kernels, "torch"):
            yield f"{name}: forward, {backend}", partial(or_why, measure, setting, case, backend, False)
        for backend in ("auto", "torch"):
            yield (
                f"{name}: forward and backward, {backend}",
                partial(or_why, measure, setting, case, backend, True),
            )


def measure(setting: Setting, case: Case, backend: str, trained: bool) -> dict[str, Any]:
    block = made(case, setting.device, setting.half)
    call = with_gradients(block) if trained else without(block)
    with ops.backend(backend):
        _, peak = with_peak_bytes(call, setting)
        seconds = setting.kernel_seconds(call)
    count = operations(without(made(case, META, setting.half)))
    count *= 3 if trained else 1  # the backward has two products for each one of the forward
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "operations": count,
        "share_of_peak": share_of_peak(count, seconds, setting.device),
    }


def made(case: Case, device: torch.device, dtype: torch.dtype) -> Block:
    """The block of a network, and tokens as they come to it."""
    config, tensor = case.config, partial(normal, device=device, dtype=dtype)
    tokens = math.prod(case.grid)
    if isinstance(config, JoyImageEditConfig):
        network = random_network(JoyImageEditTransformer3DModel, config, device, dtype)
        block, rope, width = network.double_blocks[0], network.rope(case.grid), config.hidden_size
        vec = normal(1, 6, width, device=device)
        streams = tensor(1, tokens, width), tensor(1, case.text, width)
        return Block(block, lambda img, txt: block(img, txt, vec, rope), streams)
    network = random_network(ChronoEditTransformer3DModel, config, device, dtype)
    block, rope = network.blocks[0], network.rope(case.grid)
    vec = normal(1, 6, config.width, device=device)
    (text,) = network.embed_text(tensor(1, case.text, config.text_dim))
    (image,) = network.embed_image(tensor(1, CLIP_TOKENS, config.image_dim))
    streams = (tensor(1, tokens, config.width),)
    return Block(block, lambda x: (block(x, vec, text, image, rope),), streams)


def without(block: Block) -> Callable[[], Any]:
    """The forward, as an edit calls it."""
    return partial(block.forward, *block.streams)


def with_gradients(block: Block) -> Callable[[], Any]:
    """Forward and backward: gradients of the streams and of all weights that the block applies to them."""
    block.module.requires_grad_(True)
    streams = [x.requires_grad_(True) for x in block.streams]
    wanted = [*streams, *block.module.parameters()]

    def call():
        with torch.enable_grad():
            out = block.forward(*streams)
            upstream = [torch.ones_like(x) for x in out]
            return torch.autograd.grad(out, wanted, upstream, allow_unused=True)

    return call
