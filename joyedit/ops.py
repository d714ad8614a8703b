"""The fused operations of the networks: what each one computes, in plain PyTorch.

Models call these and know nothing of what runs underneath. Every function returns fresh tensors and never
writes to its arguments. Activations may be wider than the stored weights (bf16 weights, fp32 activations): a
weight is brought to the dtype of the activation where it is used, which keeps the memory of the narrow
checkpoint and the arithmetic of the wide one.

B batch   N tokens   D width   H heads   E = D / H
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Size = int | tuple[int, ...]  # one number for all axes, or one per axis


CPU_HAS_BF16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def compute_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype to compute in for weights of `dtype` on `device`.

    A CPU without bf16 units runs bf16 and fp16 matrix products 6-8 times slower than fp32, and bf16
    convolutions over 100 times slower; there the activations are fp32 and the weights are upcast where they
    are used.
    """
    if torch.device(device).type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        return dtype if dtype is torch.bfloat16 and CPU_HAS_BF16 else torch.float32
    return dtype


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and rotations of x: fp32, or float64 where x is that already."""
    return torch.promote_types(x.dtype, torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D_in), weight (D_out, D_in), bias (D_out) -> (..., D_out) in the dtype of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0
) -> Tensor:
    """x (B, C_in, H, W), weight (C_out, C_in, kh, kw), bias (C_out) -> (B, C_out, H', W') in x's dtype."""
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding)


def conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0
) -> Tensor:
    """x (B, C_in, T, H, W), weight (C_out, C_in, kt, kh, kw), bias (C_out) -> (B, C_out, T', H', W') in x's
    dtype."""
    return F.conv3d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding)


def attention(
    q: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention over tokens; k and v may have fewer heads than q (grouped queries).

    q (B, N, H, E); k, v (B, M, H_kv, E); each may be a sequence of segments that follow one another along the
    token axis. mask (broadcastable to (B, H, N, M)): boolean, True where a query may look, or additive.
    `causal` aligns the last query with the last key, so a cached prefix may be longer than the queries.
    Returns (B, N, H, E). `scale` defaults to E ** -0.5.
    """
    q, k, v = (x if isinstance(x, Tensor) else torch.cat(tuple(x), dim=1) for x in (q, k, v))
    n, m = q.shape[1], k.shape[1]
    if causal and (n != m or mask is not None):
        rows = torch.arange(m - n, m, device=q.device)[:, None]
        visible = torch.arange(m, device=q.device)[None] <= rows  # (N, M)
        mask = visible if mask is None else mask & visible
        causal = False
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2).contiguous()


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """LayerNorm over the last axis, statistics in fp32. x (..., D); weight, bias (D)."""
    dtype = wide_dtype(x)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift. x (B, N, D); shift, scale (B or 1, D)."""
    dtype = wide_dtype(x)
    shift, scale = shift.to(dtype), 1 + scale.to(dtype)
    if len(shift) == 1:
        # One for all samples: the modulation is the affine part of the norm, and one pass over x is enough.
        return F.layer_norm(x.to(dtype), x.shape[-1:], scale[0], shift[0], eps).to(x.dtype)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None], normed, scale[:, None]).to(x.dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y. x, y (B, N, D); gate (B or 1, D)."""
    return torch.addcmul(x, y, gate[:, None].to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * weight over the last axis, statistics in fp32. x (..., D); weight (D)."""
    dtype = wide_dtype(x)
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps).to(x.dtype)


def channel_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x / rms(x) * gamma over the channels of feature maps. x (B, C, ...); gamma has C values.

    Half precision is computed in fp32. Where all channels of a position are zero the result is zero: |x| is
    taken as at least 1e-12. Source: diffusers `WanRMS_norm`.
    """
    return _channel_rms_norm(x, gamma).to(x.dtype)


def channel_rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """silu(x / rms(x) * gamma) over channels, as `channel_rms_norm`. x (B, C, ...); gamma has C values."""
    return F.silu(_channel_rms_norm(x, gamma), inplace=True).to(x.dtype)


def _channel_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    wide = wide_dtype(x)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide).clamp_min(1e-12)
    scale = gamma.to(wide).view(-1, *(1,) * (x.ndim - 2)) * gamma.numel() ** 0.5  # |x| = rms(x) * sqrt(C)
    return (x * length.reciprocal()).mul_(scale)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm, statistics in fp32. x (B, C, ...); weight, bias (C)."""
    return _group_norm(x, weight, bias, groups, eps).to(x.dtype)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """silu(GroupNorm(x)), statistics in fp32. x (B, C, ...); weight, bias (C)."""
    return F.silu(_group_norm(x, weight, bias, groups, eps), inplace=True).to(x.dtype)


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    wide = wide_dtype(x)
    x, weight, bias = x.to(wide), weight.to(wide), bias.to(wide)
    if x.device.type == "cpu" and x.ndim == 4 and x.stride(1) == 1:
        # PyTorch's channels-last kernel adds up squares: the variance of a nearly constant plane cancels.
        out = F.group_norm(x.contiguous(), groups, weight, bias, eps)
        return out.contiguous(memory_format=torch.channels_last)
    return F.group_norm(x, groups, weight, bias, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x0, x1) by the angles of each token, in fp32. x (B, N, H, E); cos, sin (N, E
    / 2)."""
    pairs = torch.view_as_complex(x.to(wide_dtype(x)).unflatten(-1, (-1, 2)).contiguous())  # (B, N, H, E/2)
    turned = pairs * torch.complex(cos, sin)[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (x[j], x[j + E/2]) by the angles of each token. x (B, N, H, E); cos, sin (B or 1, N, E / 2)."""
    a, b = x.to(wide_dtype(x)).chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """RMSNorm of q and k per head, then the interleaved rotation. q, k (B, N, H, E) strided views; weights
    (E); cos, sin (N, E / 2) fp32."""
    return rope(rms_norm(q, q_weight, eps), cos, sin), rope(rms_norm(k, k_weight, eps), cos, sin)


def qk_norm(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """RMSNorm of q and k per head, for tokens without a position. q, k (B, N, H, E); weights (E)."""
    return rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return F.silu(gate) * up


def geglu(value_gate: Tensor) -> Tensor:
    """value * gelu(gate) with the exact (erf) GELU. value_gate (..., 2 D): value, then gate -> (..., D)."""
    value, gate = value_gate.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


def rescaled_guidance(cond: Tensor, uncond: Tensor, scale: float, dim: int = 1) -> Tensor:
    """Classifier-free guidance whose norm over `dim` is brought back to that of `cond`, position by position.

    comb = uncond + scale * (cond - uncond); comb * |cond| / max(|comb|, 1e-6).
    Source: diffusers `pipeline_joyimage_edit.py`.
    """
    comb = uncond + scale * (cond - uncond)
    ratio = cond.norm(dim=dim, keepdim=True) / comb.norm(dim=dim, keepdim=True).clamp_min(1e-6)
    return comb * ratio
