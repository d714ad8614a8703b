"""The calls of a denoising step at real size: ours, the plain operations, and what others have for them.

    auto          what joyedit takes
    triton        its own attention, which may be another
    torch         the plain operations, one kernel after the other
    compile       the same, compiled by Inductor
    sdpa-cudnn    PyTorch's attention by cuDNN, with the copies that join segments
    sdpa-flash    by FlashAttention
    liger         the kernels of Liger, where it is installed and has the operation

Each is held against float64 before it is timed, by the rule of `benchmarks.ops`. `kernel_seconds`: on the
device, from an empty cache. `call_seconds`: one call after the other without waiting, so of the host if that
is slower. `fell_back`: why our kernel could not be built, where it could not: "auto" is PyTorch then.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.correctness import sized
from benchmarks.gpu.setting import Row, Setting
from benchmarks.op_cases import Case, all_cases, all_ops
from benchmarks.ops import call, check, fused_bytes
from benchmarks.roofline import SYSTEMS
from joyedit import ops

SDPA = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
LIGER = ("layer_norm", "rms_norm", "add_rms_norm", "group_norm", "swiglu", "geglu_tanh")


def rows(setting: Setting) -> Iterator[Row]:
    for case in cases(setting):
        for name in providers(case, setting):
            yield f"{case.title}: {name}", lambda case=case, name=name: timed(case, name, setting)


def cases(setting: Setting) -> list[Case]:
    """Those of a step, system by system; in a dry run the first one of each operation."""
    order = list(SYSTEMS)
    found = sorted((c for c in all_cases() if c.per_step), key=lambda case: order.index(case.system))
    if setting.dry:
        found = list({case.op: case for case in reversed(found)}.values())
    return [sized(case, setting) for case in found]


def providers(case: Case, setting: Setting) -> list[str]:
    names = ["auto", "torch", "compile"]
    if case.op == "attention":
        names += ["sdpa-flash"] if setting.dry else ["triton", *SDPA]
    if case.op in LIGER and has_liger() and not setting.dry:
        names += ["liger"]
    return names


def timed(case: Case, name: str, setting: Setting) -> dict[str, Any]:
    args, function = case.make(setting.device), provided(case, name, setting)
    error = check(case, name, function, args)
    kernel_seconds = setting.kernel_seconds(lambda: function(*args))
    call_seconds = setting.call_seconds(lambda: function(*args))
    moved = fused_bytes(args, function(*args))
    found = {
        "per_step": case.per_step,
        "kernel_seconds": kernel_seconds,
        "call_seconds": call_seconds,
        "bytes_per_second": moved / kernel_seconds,
        "error": error,
    }
    if name == "auto":
        kernel = f"joyedit.{case.op}."
        found["fell_back"] = next((why for k, why in ops._unbuilt.items() if k.startswith(kernel)), None)
    if all_ops()[case.op].matrix:
        found["operations_per_second"] = all_ops()[case.op].operations(*args) / kernel_seconds
    return found


def provided(case: Case, name: str, setting: Setting) -> Callable[..., Any]:
    """The operation of a case as one of `providers` computes it."""
    if name in SDPA:
        return by_sdpa(SDPA[name])
    if name == "liger":
        return by_liger(case.op)
    if name == "compile":
        return call(case, name, "aot_eager" if setting.dry else "inductor")
    return call(case, setting.kernels if name == "auto" else name)


# ---------------------------------------------------------------------------------------- PyTorch's attention
def joined(
    q, k, v, causal: bool = False, summed: bool = False, lengths: list[int] | None = None
) -> list[tuple]:
    """The arguments of `stock` that an attention of joyedit comes to: one for each sample or softmax."""
    q, k, v = ((x,) if isinstance(x, Tensor) else x for x in (q, k, v))
    if summed:
        parts = [(q[0], *pair) for pair in zip(k, v, strict=True)]
    else:
        q, k, v = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (q, k, v))
        samples = ((x,) if lengths is None else x.split(lengths, dim=1) for x in (q, k, v))
        parts = list(zip(*samples, strict=True))
    return [
        (*(x.transpose(1, 2) for x in part), causal, {"enable_gqa": part[0].shape[2] != part[1].shape[2]})
        for part in parts
    ]


def stock(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, options: dict[str, bool]) -> Tensor:
    """q, k, v (B, H, N, E) -> (B, N, H, E)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, **options).transpose(1, 2)


def by_sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(q, k, v, causal=False, summed=False, lengths=None) -> Tensor:
        with sdpa_kernel(backend):
            parts = [stock(*part) for part in joined(q, k, v, causal, summed, lengths)]
        if summed:
            return parts[0] + parts[1]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)

    return attention


# -------------------------------------------------------------------------------------------- Liger's kernels
def has_liger() -> bool:
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec("liger_kernel.ops") is not None
    return False


def by_liger(op: str) -> Callable[..., Any]:
    """The arithmetic of its norms is in fp32, as ours is ("gemma"; "llama" rounds before the weight)."""
    from liger_kernel import ops as liger

    def layer_norm(x, weight=None, bias=None, eps=1e-6):
        weight = torch.ones_like(x[0, 0]) if weight is None else weight
        bias = torch.zeros_like(x[0, 0]) if bias is None else bias
        return liger.LigerLayerNormFunction.apply(x, weight, bias, eps)

    def rms_norm(x, weight, eps=1e-6):
        return liger.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)

    def add_rms_norm(x, y, weight, eps=1e-6):
        normed, total = liger.LigerFusedAddRMSNormFunction.apply(x, y, weight, eps, 0.0, "gemma", False)
        return total, normed

    def group_norm(x, weight, bias, groups, eps):
        return liger.LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], groups, eps)

    def swiglu(gate, up):
        return liger.LigerSiLUMulFunction.apply(gate, up)

    def geglu_tanh(gate, value):
        return liger.LigerGELUMulFunction.apply(gate, value)

    known = (layer_norm, rms_norm, add_rms_norm, group_norm, swiglu, geglu_tanh)
    return {function.__name__: function for function in known}[op]
