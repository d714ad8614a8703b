"""Every operation on the device against float64, forward and, where it is trained, backward.

The cases of `op_cases` at their real sizes, those of a denoising step first, and then the odd ones: ragged
rows, widths that are no power of two, batches with a vector for each sample, strided views, causal prefixes,
packed samples, two segments; in fp32, fp16 and bf16. The bound is that of `benchmarks.ops`: at most twice as
far from float64 as the plain operations in the same dtype.

By the way, torch.compile gets to know the calls of a step, in many processes at once: the area `calls`, whose
rows wait for one another, then finds them in Inductor's cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.setting import Row, Setting
from benchmarks.op_cases import Case, T, exact_cases
from benchmarks.op_cases.guide import DELTA
from benchmarks.ops import call, check, floats, widened, worst_error
from joyedit import ops

SINGLE = torch.float32
MAPS = ("channel_rms_norm", "channel_rms_norm_silu", "group_norm", "group_norm_silu", "guide")


def rows(setting: Setting) -> Iterator[Row]:
    known, dtypes = sorted(exact_cases(), key=lambda case: not case.per_step), (SINGLE,)
    if setting.dry:
        known = {(case.op, case.system): sized(case, setting) for case in reversed(known)}.values()
    else:
        dtypes = SINGLE, torch.float16, torch.bfloat16
    for case in (*known, *(case for dtype in dtypes for case in odd(dtype))):
        yield case.title, lambda case=case: held(case, setting)


def held(case: Case, setting: Setting) -> dict[str, Any]:
    args = case.make(setting.device)
    found: dict[str, Any] = {"error": check(case, "triton", call(case, "triton"), args)}
    if case.trained:
        found["gradient_error"] = check_gradients(case, args)
    if case.per_step and not setting.dry:
        try:
            found["compiled_error"] = check(case, "compile", call(case, "compile"), args)
        except Exception as error:  # not a fault of ours, and its own row tells it
            found["compiled_error"] = f"{type(error).__name__}: {error}"[:300]
    return found


def check_gradients(case: Case, args: tuple[Any, ...]) -> float:
    """Largest error of a gradient relative to its scale, for random gradients of the results. Raises
    UnequalResults, with the bound of the results themselves."""
    with torch.no_grad(), ops.backend("torch"):
        upstream = [torch.randn_like(out) for out in floats(getattr(ops, case.op)(*args))]

    def gradients(backend: str, args: tuple[Any, ...], upstream: list[Tensor]) -> tuple[Tensor, ...]:
        args = tuple(a.detach().requires_grad_() if is_float(a) else a for a in args)
        with torch.enable_grad(), ops.backend(backend):
            out = floats(getattr(ops, case.op)(*args))
            return torch.autograd.grad(out, [a for a in args if is_float(a)], upstream)

    exact = gradients("torch", widened(args), widened(upstream))
    plain, ours = (gradients(backend, args, upstream) for backend in ("torch", "triton"))
    return worst_error(f"{case.title}: the gradient", ours, plain, exact)


def is_float(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


# ----------------------------------------------------------------------------------------------- the odd ones
def odd(dtype: torch.dtype) -> list[Case]:
    """Calls that no system makes, of every operation, with what its kernel must mask, stride or index."""
    name = str(dtype).removeprefix("torch.")
    rows, slices = T((2, 37, 1001), dtype), T((2, 37, 3, 1001), dtype, lambda x: x[:, :, 1])
    vector, vectors = T((1001,), dtype), T((2, 6, 1001), SINGLE, lambda x: x[:, 2])
    maps = T((2, 60, 7, 9), dtype)
    last = T((2, 7, 9, 60), dtype, lambda x: x.movedim(-1, 1))
    channels = T((60,), dtype)
    longer = T((2, 24, 3, 24), dtype, lambda x: x[:, :19])

    def trained(op: str, what: str, *args: Any) -> Case:
        return Case(op, "odd", f"{what}, {name}", args, trained=True)

    def heads(tokens: int, heads: int, width: int, part: int = 0) -> T:
        """Of a sample, of a projection to two."""
        return T((2, tokens, 2, heads, width), dtype, lambda x: x[:, :, part])

    def one(tokens: int, heads: int, width: int) -> T:
        return T((1, tokens, heads, width), dtype)

    return [
        trained("ada_layer_norm", "strided rows, a vector for each sample", slices, vectors, vectors),
        trained("layer_norm", "strided rows", slices, vector, vector),
        trained("gate_residual", "a vector for each sample", slices, rows, vectors),
        trained("gate_residual_norm", "a vector for each sample", rows, slices, vectors, vectors, vectors),
        trained(
            "gate_residual_layer_norm", "a vector for each sample", rows, slices, vectors, vector, vector
        ),
        trained("rms_norm", "strided rows", slices, vector),
        trained("add_rms_norm", "strided rows", rows, slices, vector),
        trained("channel_rms_norm", "planes", maps, channels),
        trained("channel_rms_norm_silu", "channels last", last, channels),
        trained("group_norm", "channels last", last, channels, channels, 4, 1e-5),
        trained("group_norm_silu", "planes", maps, channels, channels, 4, 1e-5),
        trained("swiglu", "strided rows", slices, rows),
        trained("geglu", "an odd width", T((2, 37, 2 * 77), dtype)),
        trained("geglu_tanh", "strided rows", rows, slices),
        trained("gelu_tanh", "strided rows", slices),
        trained(
            "qk_norm_rope",
            "each head, grouped, halves, queries that start late",
            *(heads(5, 6, 24), heads(9, 2, 24, part=1), T((24,), dtype), T((24,), dtype)),
            *((T((2, 9, 12), SINGLE), T((2, 9, 12), SINGLE)), 1e-6, True, 4),
        ),
        trained(
            "qk_norm_rope",
            "all heads together",
            *(heads(19, 5, 24), heads(19, 5, 24, part=1), T((120,), dtype), T((120,), dtype)),
            (T((19, 12), SINGLE), T((19, 12), SINGLE)),
        ),
        Case(
            "qk_norm_rope",
            "odd",
            f"written into parts of larger tensors, {name}",
            (
                *(heads(19, 3, 24), heads(19, 3, 24, part=1), T((24,), dtype), T((24,), dtype)),
                *((T((19, 12), SINGLE), T((19, 12), SINGLE)), 1e-6, False, 0, (longer, longer)),
            ),
        ),
        Case(
            "guide",
            "odd",
            f"a step, {name}",
            (*(T((2, 5, 3, 7, 9), dtype),) * 2, 4.0, True, T((2, 5, 3, 7, 9), SINGLE), DELTA),
        ),
        *(
            Case("attention", "odd", f"{what}, {name}", args)
            for what, args in {
                "ragged": (heads(131, 3, 72), *(heads(333, 3, 72, part=1),) * 2),
                "wide heads": (heads(70, 2, 160), *(heads(65, 1, 160),) * 2),
                "causal after a prefix": (heads(70, 6, 128), *(heads(200, 2, 128),) * 2, True),
                "packed": (*(one(164, 3, 64),) * 3, False, False, [33, 1, 130]),
                "two segments": (
                    (heads(131, 2, 128), heads(7, 2, 128)),
                    *((heads(70, 2, 128), heads(133, 2, 128, part=1)),) * 2,
                ),
                "summed": (heads(70, 4, 40), *((heads(129, 4, 40), heads(65, 4, 40)),) * 2, False, True),
            }.items()
        ),
    ]


# ----------------------------------------------------------------------------------------- sizes of a dry run
def viewed(t: T) -> tuple[int, ...]:
    return tuple(t.view(torch.empty(t.shape, device="meta")).shape)


def sized(case: Case, setting: Setting) -> Case:
    """The case as it is; in a dry run with few tokens, heads, pixels or groups, and fp32 for bf16."""
    if not setting.dry:
        return case
    channels = case.args[1].shape[0] if case.op in MAPS else None

    def fewer(shape: tuple[int, ...]) -> tuple[int, ...]:
        if case.op in MAPS:
            return tuple(n if n <= 16 or n == channels else 3 + n // 256 for n in shape)
        outer, width = [-(-n // 512) if n > 64 else n for n in shape[:-1]], shape[-1]
        if case.op in ("attention", "qk_norm_rope"):
            if len(shape) > 3:
                outer[-1] = -(-outer[-1] // 8)
            elif len(shape) == 1 and width > 256:
                width //= 8  # the weight of all heads
        return (*outer, width)

    def tiny(value: Any) -> Any:
        if isinstance(value, T):
            dtype = SINGLE if value.dtype == torch.bfloat16 else value.dtype
            small, wanted = T(fewer(value.shape), dtype, value.view), fewer(viewed(value))
            return small if viewed(small) == wanted else T(wanted, dtype)  # a view that names positions
        if isinstance(value, tuple):
            return tuple(map(tiny, value))
        if isinstance(value, list):
            return [n // 512 for n in value]  # lengths of samples
        return 4 if value == 32 else value  # groups

    return case._replace(args=tiny(case.args))
