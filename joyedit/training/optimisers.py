"""Optimisers that torch does not have: Muon for kernels of any rank, and AdamW at rates within a parameter.

torch's own Muon takes matrices alone and computes in bf16; here kernels of convolutions learn too, in the
dtype of their weights. A rate serves for both optimisers: a step of Muon is as large as one of Adam.

R rows   C columns
Source: Jordan et al., Muon, 2024; the scale is that of arXiv 2502.16982, section 2.2.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adamw", "muon")
BETAS, WEIGHT_DECAY = (0.9, 0.99), 0.01


def make_optimizer(kind: str, parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """AdamW of all parameters; or Muon of those that are kernels, and AdamW of the others. Raises ValueError
    for another word."""
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer={kind!r}: must be one of {', '.join(OPTIMIZERS)}")
    options: dict[str, Any] = {"lr": rate, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
    if kind == "adamw":
        return torch.optim.AdamW(parameters, **options)
    others = [p for p in parameters if not is_kernel(p)]
    return Muon([p for p in parameters if is_kernel(p)], others, **options)


def is_kernel(p: Tensor) -> bool:
    """Whether it is a matrix, or can be looked at as one, of more than one row and column."""
    return p.ndim > 1 and len(p) > 1 and p[0].numel() > 1


class Muon(torch.optim.AdamW):
    """Momentum whose steps are orthogonalised: every direction of a weight matrix learns equally fast.

    kernels (R, ...) are matrices of as many columns as there are numbers in a row. Columns that never had a
    gradient (of a temporal kernel while pictures are trained) stay as they are. others: what AdamW trains, at
    `share` of the rate; options: of AdamW.
    """

    def __init__(
        self,
        kernels: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        share: float = 1.0,
        **options: Any,
    ):
        orthogonal = {"params": list(kernels), "momentum": momentum}
        plain = {"params": list(others), "lr": share * lr, "share": share}
        super().__init__([orthogonal, plain], lr=lr, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        orthogonal, plain = self.param_groups
        for p in orthogonal["params"]:
            if p.grad is not None:
                self._move(p, orthogonal["lr"], orthogonal["momentum"])
        self.param_groups = [plain]
        try:
            super().step(closure)
        finally:
            self.param_groups = [orthogonal, plain]

    def _move(self, p: nn.Parameter, lr: float, share: float) -> None:
        state, grad = self.state[p], p.grad
        assert grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(p)
            state["step"] = torch.zeros(())  # which AdamW looks for in every state that it loads
        state["step"] += 1
        momentum = state["momentum"].lerp_(grad, 1 - share)
        update = grad.lerp(momentum, share).flatten(1)
        live = update.any(0)
        columns = orthogonalize(update[:, live])
        update[:, live] = columns
        p.add_(update.view_as(p), alpha=-lr * 0.2 * math.sqrt(max(columns.shape, default=1)))


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """The matrix nearest to x (R, C) whose singular values are all about 1, by Newton-Schulz steps."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class RatedAdamW(torch.optim.AdamW):
    """AdamW in which parts of some parameters learn at a share of the rate.

    shares: parameter -> a tensor that broadcasts to it. (A smaller gradient would not do: Adam divides by
    it.)
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], shares: Mapping[nn.Parameter, Tensor], **options: Any
    ):
        super().__init__(parameters, fused=True, **options)
        self.shares = dict(shares)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        before = {p: p.clone() for p in self.shares}
        super().step(closure)
        for p, share in self.shares.items():
            p.copy_(torch.lerp(before[p], p, share.expand_as(p)))
