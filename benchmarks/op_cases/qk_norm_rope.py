"""Calls of kernels/qk_norm_rope.py."""

import torch
import torch.nn.functional as F

from benchmarks.op_cases import Case, Op, T


def joyimage(q, k, q_weight, k_weight, rope, eps=1e-6, half_split=False, start=0, out=None):
    """The results are new tensors, which `attention` then joins. The norm is torch.nn.RMSNorm, one kernel on
    a GPU. Elsewhere torch takes it apart, so the bytes are counted on the LayerNorm of the same size. The
    rotation is in fp32."""
    if half_split:
        return qwen(q, k, q_weight, k_weight, rope)

    def turned(x):
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        across = torch.stack((-second, first), dim=-1).flatten(-2)
        return (x.float() * cos + across * sin).to(x.dtype)

    q, k = (F.layer_norm(x, x.shape[-1:], w, eps=eps) for x, w in ((q, q_weight), (k, k_weight)))
    if rope is None:
        return q, k
    cos, sin = (as_wide_as_a_head(t)[:, None] for t in rope)
    return turned(q), turned(k)


def chronoedit(q, k, q_weight, k_weight, rope, eps=1e-6):
    """The norm as above, over all heads; the rotation is in fp32."""

    def turned(x, weight):
        rows = F.layer_norm(x.flatten(2), weight.shape, weight, eps=eps)
        first, second = rows.view(x.shape).unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        out[..., 0::2] = first * cos - second * sin
        out[..., 1::2] = first * sin + second * cos
        return out

    cos, sin = (as_wide_as_a_head(t)[:, None, ::2] for t in rope)
    return turned(q, q_weight), turned(k, k_weight)


def qwen(q, k, q_weight, k_weight, rope):
    """Qwen3-VL: in the text model every step but the norm is in the dtype, in the vision tower in fp32."""

    def normed(x, weight):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight

    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    cos, sin = (as_wide_as_a_head(t)[:, :, None] for t in rope)
    if q_weight is None:
        return tuple(turned(x.float()).to(x.dtype) for x in (q, k))
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    return turned(normed(q, q_weight)), turned(normed(k, k_weight))


def as_wide_as_a_head(table):
    """The references keep cos and sin of each pair twice."""
    return torch.empty((*table.shape[:-1], 2 * table.shape[-1]), dtype=table.dtype, device=table.device)


def operations(q, k, q_weight, k_weight, rope, *others):
    each = (0 if q_weight is None else 4) + (0 if rope is None else 3)
    return each * (q.numel() + k.numel())


def projected(tokens: int, heads: int, width: int, part: int) -> T:
    """q (part 0) or k (part 1) of one projection to q, k and v."""
    whole = (1, tokens, 3, heads, width)
    return T(whole, view=lambda x: x[:, :, part])


def joint(tokens: tuple[int, int], heads: int, width: int, part: int) -> tuple[T, T]:
    """Where q and k of one of two streams are written, in front of or behind the other's."""
    begin, end = ((0, tokens[0]), (tokens[0], sum(tokens)))[part]
    place = T((1, sum(tokens), heads, width), view=lambda x: x[:, begin:end])
    return place, place


def table(*shape: int) -> tuple[T, T]:
    return T(shape, SINGLE), T(shape, SINGLE)


SINGLE = torch.float32
OPS = {
    "qk_norm_rope": Op(
        "RMSNorm of q and k, rotary embedding, copies out of the projection",
        {"joyimage": joyimage, "chronoedit": chronoedit},
        (T((1, 4, 2, 16)), T((1, 4, 2, 16)), T((16,)), T((16,)), table(4, 8)),
        operations,
    )
}
STREAMS = (8192, 1100)
IMAGE = (*(projected(8192, 32, 128, part) for part in (0, 1)), T((128,)), T((128,)), table(8192, 64))
TEXT = (*(projected(1100, 32, 128, part) for part in (0, 1)), T((128,)), T((128,)), None)
CASES = [
    Case(
        "qk_norm_rope",
        "joyimage",
        "image tokens, in front of the text's",
        (*IMAGE, 1e-6, False, 0, joint(STREAMS, 32, 128, 0)),
        per_step=80,
        per_block=1,
    ),
    Case(
        "qk_norm_rope",
        "joyimage",
        "text tokens, behind the image's, no rotation",
        (*TEXT, 1e-6, False, 0, joint(STREAMS, 32, 128, 1)),
        per_step=80,
        per_block=1,
    ),
    Case("qk_norm_rope", "joyimage", "image tokens, to new tensors", IMAGE, trained=True),
    Case(
        "qk_norm_rope",
        "chronoedit",
        "tokens, all heads together",
        (T((1, 7200, 40, 128)), T((1, 7200, 40, 128)), T((5120,)), T((5120,)), table(7200, 64)),
        per_step=80,
        per_block=1,
        trained=True,
    ),
    Case(
        "qk_norm_rope",
        "chronoedit",
        "tokens in fp32, all heads together",
        (
            *(T((1, 7200, 40, 128), SINGLE), T((1, 7200, 40, 128), SINGLE)),
            *(T((5120,), SINGLE), T((5120,), SINGLE), table(7200, 64)),
        ),
    ),
    Case(
        "qk_norm_rope",
        "joyimage",
        "prompt encoder, grouped queries, halves",
        (
            *(T((1, 1098, 32, 128)), T((1, 1098, 8, 128)), T((128,)), T((128,)), table(1, 1098, 64)),
            *(1e-6, True),
        ),
        trained=True,
    ),
    Case(
        "qk_norm_rope",
        "joyimage",
        "prompt encoder's vision tower, no norm, halves",
        (*(projected(4096, 16, 72, part) for part in (0, 1)), None, None, table(1, 4096, 36), 1e-6, True),
    ),
]
