"""Calls of kernels/attention.py."""

import torch

from benchmarks.op_cases import Case, Op, T

HALF = torch.float16
PATCHES = [64 * 64] * 2  # of two images, in the vision tower


def separate(q, k, v, causal=False, summed=False, lengths=None):
    """The references join segments by copies, and call PyTorch's kernel for each sample and each softmax."""
    q, k, v = (x if isinstance(x, tuple) else (x,) for x in (q, k, v))
    if summed:
        first, second = (in_one_kernel(*q, *pair) for pair in zip(k, v, strict=True))
        return first + second
    q, k, v = (torch.cat(x, dim=1) if len(x) > 1 else x[0] for x in (q, k, v))
    if lengths is None:
        return in_one_kernel(q, k, v, causal)
    samples = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([in_one_kernel(*sample) for sample in samples], dim=1)


def in_one_kernel(q, k, v, causal=False):
    """FlashAttention as one operation; elsewhere than on a GPU, torch would take it apart."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0].transpose(1, 2)


def multiplied(q, k, v, causal=False, summed=False, lengths=None) -> int:
    """Both products of the queries and keys that see one another."""
    n, m = (sum(x.shape[1] for x in (part if isinstance(part, tuple) else (part,))) for part in (q, k))
    first = q[0] if isinstance(q, tuple) else q
    pairs = sum(count * count for count in lengths) if lengths else n * m
    if causal:
        pairs -= n * (n - 1) // 2
    return 4 * len(first) * pairs * first.shape[2] * first.shape[3]


def projected(tokens: int, heads: int, width: int, dtype=torch.bfloat16, batch: int = 1, of: int = 3) -> T:
    """(B, N, H, E), one of so many slices of a fused projection."""
    return T((batch, tokens, of, heads, width), dtype, lambda x: x[:, :, of - 1])


def alone(tokens: int, heads: int, width: int, dtype=torch.bfloat16, batch: int = 1) -> T:
    """(B, N, H, E), the result of an operation of its own."""
    return T((batch, tokens, heads, width), dtype)


def all_of(tokens: int, heads: int, width: int, dtype=torch.bfloat16, batch: int = 1) -> tuple[T, T, T]:
    x = alone(tokens, heads, width, dtype, batch)
    return x, x, x


OPS = {
    "attention": Op(
        "softmax(q k) v over segments, samples or a causal prefix, without joining them",
        separate,
        all_of(4, 2, 16),
        multiplied,
        matrix=True,
        instructions={
            "sm_80": ("HMMA", "LDGSTS"),
            "sm_86": ("HMMA", "LDGSTS"),
            "sm_89": ("HMMA", "LDGSTS"),
            "sm_90": ("HGMMA", "UTMALDG"),
            "sm_100": ("UTCHMMA", "UTMALDG"),
            "sm_120": ("HMMA", "UTMALDG"),
            "hip": ("v_mfma", r"(global|buffer)_load_(b128|dwordx4)"),
        },
    )
}
JOINT_K = (alone(8192, 32, 128), alone(1100, 32, 128))
JOINT_V = (projected(8192, 32, 128), projected(1100, 32, 128))
TARGET = alone(4096, 32, 128)
TARGET_V = (projected(8192, 32, 128, of=2), projected(1100, 32, 128, of=2))
CONTEXT = (alone(512, 40, 128), alone(257, 40, 128))
CASES = [
    Case("attention", "joyimage", "image and text", (JOINT_K, JOINT_K, JOINT_V), 78, 1),
    Case("attention", "joyimage", "last block, to image and text", (TARGET, JOINT_K, TARGET_V), 2),
    Case("attention", "chronoedit", "self", all_of(7200, 40, 128), 80, 1),
    Case(
        "attention",
        "chronoedit",
        "cross, to text and to image",
        (alone(7200, 40, 128), CONTEXT, CONTEXT, False, True),
        80,
        1,
    ),
    Case(
        "attention",
        "joyimage",
        "prompt encoder, causal",
        (alone(1098, 32, 128), *(alone(1098, 8, 128),) * 2, True),
    ),
    Case(
        "attention",
        "joyimage",
        "vision tower, two images",
        (*(alone(sum(PATCHES), 16, 72),) * 2, projected(sum(PATCHES), 16, 72), False, False, PATCHES),
    ),
    Case("attention", "diffedit", "self at 96 x 96", all_of(96 * 96, 5, 64, HALF, 2), 5, 1),
    Case("attention", "diffedit", "1.5: self at 64 x 64", all_of(64 * 64, 8, 40, HALF, 2)),
    Case("attention", "diffedit", "1.5: self at 16 x 16", all_of(16 * 16, 8, 160, HALF, 2)),
    Case("attention", "chronoedit", "CLIP vision", all_of(257, 16, 80)),
    Case("attention", "diffedit", "CLIP text, causal", (*all_of(77, 16, 64, HALF, 2), True)),
    Case("attention", "chronoedit", "self in fp32", all_of(7200, 40, 128, torch.float32)),
]
