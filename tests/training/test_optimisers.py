"""Muon and AdamW at rates within a parameter."""

import pytest
import torch
from torch import nn

from joyedit.training.loop import check_share
from joyedit.training.optimisers import Muon, RatedAdamW, is_kernel, make_optimizer, orthogonalize
from joyedit.training.processes import Processes
from joyedit.training.settings import Settings


def test_rates_are_shares_of_the_step():
    slow, fast = (nn.Parameter(torch.ones(3)) for _ in range(2))
    share = torch.tensor([1.0, 0.1, 0.0])
    optimizer = RatedAdamW([slow, fast], {slow: share}, lr=0.5, weight_decay=0)
    (slow + fast).sum().backward()
    optimizer.step()
    assert torch.allclose(1 - slow, (1 - fast) * share) and (1 - fast).abs().min() > 0.4


def test_muon_makes_all_directions_equal_and_leaves_untouched_columns():
    values = torch.linalg.svdvals(orthogonalize(torch.randn(12, 40)))
    assert values.min() > 0.5 and values.max() < 1.5
    kernel = nn.Parameter(torch.randn(6, 5, 3, 3, 3))
    before = kernel.detach().clone()
    kernel[:, :, -1].square().sum().backward()
    Muon([kernel], [], 0.1).step()
    assert torch.equal(kernel[:, :, :-1], before[:, :, :-1])
    step = (kernel - before)[:, :, -1].detach()
    assert step.square().mean().sqrt() == pytest.approx(0.1 * 0.2, rel=0.3)  # as large as Adam's


def test_what_is_no_kernel_is_trained_as_by_adamw_and_both_go_on():
    """Three steps, of which the last is done by another optimiser that was given the state."""
    shapes = {"linear": (6, 4), "row": (1, 8), "column": (8, 1), "gain": (5,)}
    assert [is_kernel(torch.empty(shape)) for shape in shapes.values()] == [True, False, False, False]
    torch.manual_seed(0)
    start = {name: torch.randn(shape) for name, shape in shapes.items()}
    gradients = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)]
    found = {}
    for kind in ("adamw", "muon"):
        live = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
        optimizer = make_optimizer(kind, list(live.values()), 0.1)
        for i, step in enumerate(gradients):
            if i == 2:
                state, optimizer = optimizer.state_dict(), make_optimizer(kind, list(live.values()), 0.7)
                optimizer.load_state_dict(state)
            for name, p in live.items():
                p.grad = step[name]
            optimizer.step()
        found[kind] = live
    for name in ("row", "column", "gain"):
        assert torch.equal(found["adamw"][name], found["muon"][name]), name
    momentum, expected = torch.zeros(6, 4), start["linear"].clone()
    for step in gradients:  # Nesterov's, with 0.95
        momentum = 0.95 * momentum + 0.05 * step["linear"]
        update = 0.05 * step["linear"] + 0.95 * momentum
        expected -= 0.1 * 0.2 * 6**0.5 * orthogonalize(update)
    assert torch.allclose(found["muon"]["linear"], expected, atol=1e-6)
    with pytest.raises(ValueError, match="optimizer='sgd'"):
        make_optimizer("sgd", [], 0.1)


def test_matrices_that_processes_divide_are_not_orthogonalised():
    whole = Settings(data="d", model="m", full=True, optimizer="muon", batch=2)
    check_share(whole, Processes())
    check_share(Settings(data="d", model="m", optimizer="muon", batch=2), Processes(1, 2))
    with pytest.raises(ValueError, match="optimizer='muon'"):
        check_share(whole, Processes(1, 2))
