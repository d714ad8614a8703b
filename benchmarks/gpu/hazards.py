"""What goes wrong on a GPU and nowhere else: offsets beyond 2^31, other streams, graphs, modes of PyTorch.

Every operation, forced to its kernel, in each situation, and held against float64 like everywhere. Then one
block of each network through torch.compile without a graph break.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.gpu.correctness import odd, sized
from benchmarks.gpu.setting import Row, Setting
from benchmarks.op_cases import Case, T, exact_ops, made
from benchmarks.ops import call, floats, widened, worst_error
from joyedit import ops
from joyedit.models import chronoedit_dit, joyimage_mmdit, sd_unet

SINGLE = torch.float32


def rows(setting: Setting) -> Iterator[Row]:
    for case, count in beyond_31_bits(setting):
        yield f"offsets beyond 2^31: {case.title}", partial(at_the_end, case, count, setting)
    for name, block in BLOCKS.items():
        yield f"torch.compile(fullgraph=True): a block of {name}", partial(compiled, block, setting)
    for situation, run in SITUATIONS.items():
        for case in calls(setting):
            yield f"{situation}: {case.title}", partial(run, case, setting)


def calls(setting: Setting) -> list[Case]:
    """Of every operation; in a dry run on a few elements."""
    if not setting.dry:
        return odd(setting.half)
    return [sized(Case(name, "dry", "few elements", op.small), setting) for name, op in exact_ops().items()]


def plain(case: Case, args: tuple[Any, ...]) -> list[Tensor]:
    with ops.backend("torch"):
        return floats(getattr(ops, case.op)(*args))


def error(case: Case, found: list[Tensor], args: tuple[Any, ...]) -> float:
    found = [out.clone() for out in found]  # into which the next one may write again
    return worst_error(case.title, found, plain(case, args), plain(case, widened(args)))


# ------------------------------------------------------------------------------------- offsets beyond 2^31
def beyond_31_bits(setting: Setting) -> Iterator[tuple[Case, int]]:
    """Calls with a tensor of more than 2^31 elements, and the length of the axis that makes it so: no other
    axis is as long, and what happens at its end depends on nothing before it but the keys of an attention."""
    elements = 2**12 if setting.dry else 2**31
    half = setting.half

    def longer(*others: int) -> int:
        """Of an axis beside these, odd."""
        return elements // torch.Size(others).numel() // 2 * 2 + 7

    n = longer(4096)
    x, vector, single = T((1, n, 4096), half), T((4096,), half), T((1, 4096), SINGLE)
    for op, args in {
        "rms_norm": (x, vector),
        "add_rms_norm": (x, x, vector),
        "layer_norm": (x, vector, vector),
        "ada_layer_norm": (x, single, single),
        "gate_residual": (x, x, single),
        "gate_residual_norm": (x, x, single, single, single),
        "gate_residual_layer_norm": (x, x, single, vector, vector),
        "gelu_tanh": (x,),
        "swiglu": (x, x),
        "geglu_tanh": (x, x),
        "geglu": (x,),
    }.items():
        yield Case(op, "beyond", "rows", args), n
    q, weight, table = T((1, n, 32, 128), half), T((128,), half), T((n, 64), SINGLE)
    yield Case("qk_norm_rope", "beyond", "tokens", (q, q, weight, weight, (table, table))), n

    height, width = (3, 5) if setting.dry else (240, 320)
    n = longer(96, height, width)
    maps = T((1, 96, n, height, width), half), T((96,), half)
    yield Case("channel_rms_norm_silu", "beyond", "frames", maps), n
    n = longer(320, height, width)
    maps = T((n, 320, height, width), half), T((320,), half), T((320,), half)
    yield Case("group_norm_silu", "beyond", "samples", (*maps, 4, 1e-5)), n

    n = longer(256, 4, 128)
    q = T((n, 16 if setting.dry else 256, 4, 128), half)
    yield Case("attention", "beyond", "samples", (q, q, q)), n
    n = longer(3, 8, 128)
    q, k = T((1, 16, 8, 128), half), T((1, n, 3, 8, 128), half, lambda x: x[:, :, 1])
    yield Case("attention", "beyond", "keys of a projection", (q, k, k)), n


def at_the_end(case: Case, count: int, setting: Setting) -> dict[str, Any]:
    """The last results, against those of the same inputs in small tensors."""

    def end(t: Tensor) -> Tensor:
        return t.narrow(t.shape.index(count), count - 5, 5) if count in t.shape else t

    args = case.make(setting.device)
    with ops.backend("triton"):
        found = [end(t).clone() for t in floats(getattr(ops, case.op)(*args))]
    elements = max(
        t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(args) if is_tensor(t)
    )
    if "keys" not in case.what:
        args = tree_map_only(Tensor, lambda t: end(t).clone(), args)
    return {"elements": elements, "error": error(case, found, args)}


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


# --------------------------------------------------------------------------------------------- situations
def in_second_stream(case: Case, setting: Setting) -> dict[str, Any]:
    """What another stream was told before is still going on: a kernel in the wrong stream would come after
    it, and too late."""
    args, function = case.make(setting.device), call(case, "triton")
    function(*args)  # built
    setting.finish()
    if setting.dry:
        return {"error": error(case, floats(function(*args)), args)}
    matrix = torch.ones(4096, 4096, dtype=setting.half, device=setting.device)
    product = torch.empty_like(matrix)
    for _ in range(500):
        torch.mm(matrix, matrix, out=product)
    busy, stream = torch.cuda.Event(), torch.cuda.Stream(setting.device)
    busy.record()
    with torch.cuda.stream(stream):
        found = [out.clone() for out in floats(function(*args))]
    stream.synchronize()
    overlapped = not busy.query()
    setting.finish()
    return {"overlapped": overlapped, "error": error(case, found, args)}


def in_a_graph(case: Case, setting: Setting) -> dict[str, Any]:
    """Captured with some inputs and replayed with others."""
    args, others = case.make(setting.device), case.make(setting.device)
    function = call(case, "triton")
    found = function(*args)
    setting.finish()
    graph = None if setting.dry else torch.cuda.CUDAGraph()
    if graph:
        with torch.cuda.graph(graph):
            found = function(*args)
    for old, new in zip(tree_leaves(args), tree_leaves(others), strict=True):
        if is_tensor(old):
            old.copy_(new)
    if graph:
        graph.replay()
    else:
        found = function(*args)
    setting.finish()
    return {"error": error(case, floats(found), args)}


def in_inference_mode(case: Case, setting: Setting) -> dict[str, Any]:
    with torch.inference_mode():
        args = case.make(setting.device)
        return {"error": error(case, floats(call(case, "triton")(*args)), args)}


def under_autocast(case: Case, setting: Setting) -> dict[str, Any]:
    """Kernels choose their own precision: the result is the same, and of the same dtype."""
    args, function = case.make(setting.device), call(case, "triton")
    with torch.autocast(setting.device.type, torch.bfloat16):
        found = floats(function(*args))
    dtypes = [out.dtype for out in floats(function(*args))]
    if [out.dtype for out in found] != dtypes:
        raise TypeError(f"{[out.dtype for out in found]} under autocast, {dtypes} without")
    return {"error": error(case, found, args)}


SITUATIONS = {
    "second stream": in_second_stream,
    "graph replay": in_a_graph,
    "inference mode": in_inference_mode,
    "autocast": under_autocast,
}


# ------------------------------------------------------------------------------------------ torch.compile
class Block(NamedTuple):
    """One of a network, what calls it (with itself first), and what with."""

    module: nn.Module
    forward: Callable[..., Any]
    inputs: tuple[T, ...]


def joyimage() -> Block:
    def forward(block, img, txt, vec, cos, sin):
        return block(img, txt, vec, (cos, sin))

    block = joyimage_mmdit.DoubleStreamBlock(width=256, num_heads=2, hidden_width=512)
    table = T((30, 64), SINGLE)
    return Block(block, forward, (T((1, 30, 256)), T((1, 7, 256)), T((1, 6, 256), SINGLE), table, table))


def chronoedit() -> Block:
    def forward(block, x, vec, text, image, cos, sin):
        return block(x, vec, (text, text), (image, image), (cos, sin))

    width = 256
    config = chronoedit_dit.ChronoEditConfig(
        num_attention_heads=2, attention_head_dim=128, ffn_dim=512, added_kv_proj_dim=width
    )
    table, vec = T((30, 64), SINGLE), T((1, 6, width), SINGLE)
    text, image = T((1, 7, 2, 128)), T((1, 5, 2, 128))
    return Block(chronoedit_dit.Block(config), forward, (T((1, 30, width)), vec, text, image, table, table))


def stable_diffusion() -> Block:
    def forward(blocks, x, time, text):
        resnet, transformer = blocks
        context = {block.attn2: block.attn2.embed(text) for block in transformer.transformer_blocks}
        conditions = sd_unet.Conditions({resnet: time}, context, len(x))
        return transformer(resnet(x, conditions), conditions)

    config = sd_unet.UNet2DConditionConfig(
        block_out_channels=(64, 128),
        attention_head_dim=(1, 2),
        down_block_types=sd_unet.DOWN_BLOCKS,
        up_block_types=sd_unet.UP_BLOCKS,
        use_linear_projection=True,
    )
    blocks = nn.ModuleList([sd_unet.ResnetBlock(config, 64, 128), sd_unet.Transformer2D(config, 1)])
    return Block(blocks, forward, (T((2, 64, 9, 7)), T((1, 128)), T((2, 11, config.context_dim))))


BLOCKS = {"joyimage": joyimage, "chronoedit": chronoedit, "stable diffusion": stable_diffusion}


def compiled(build: Callable[[], Block], setting: Setting) -> dict[str, Any]:
    """Without a graph break, and as near to float64 as the plain operations."""
    with setting.device:
        block, forward, described = build()
    for parameter in block.requires_grad_(False).to(setting.half).parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    inputs = case_inputs(described, setting)
    torch.compiler.reset()
    graph = torch.compile(
        partial(forward, block), fullgraph=True, backend="aot_eager" if setting.dry else "inductor"
    )
    with ops.backend(setting.kernels):
        found = floats(graph(*inputs))
    with ops.backend("torch"):
        rounded = floats(forward(block, *inputs))
        exact = floats(forward(copy.deepcopy(block).double(), *widened(inputs)))
    return {"error": worst_error("compiled", found, rounded, exact)}


def case_inputs(described: tuple[T, ...], setting: Setting) -> tuple[Tensor, ...]:
    half = tuple(t if t.dtype == SINGLE else t._replace(dtype=setting.half) for t in described)
    return made(half, setting.device)
