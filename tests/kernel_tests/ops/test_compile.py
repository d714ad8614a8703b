"""A compiled function calls the kernels as single nodes of one graph, and differentiates through them."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from joyedit import ops


def block(x, y, weight, vectors):
    shift, scale, gate = vectors.unbind(1)
    x, normed = ops.gate_residual_norm(x, ops.rms_norm(y, weight), gate, shift, scale)
    x = ops.gate_residual(x, ops.layer_norm(normed, weight), gate)
    return ops.ada_layer_norm(x, shift, scale)


OPERATIONS = ["rms_norm", "gate_residual_norm", "layer_norm", "gate_residual", "ada_layer_norm"]


@pytest.fixture
def graphs():
    """The kernels in each graph that is compiled, in order, and the backend that writes them down."""
    found = []

    def backend(graph, inputs):
        targets = (node.target for node in graph.graph.nodes if node.op == "call_function")
        found.append([t.name().split("::")[1] for t in targets if getattr(t, "namespace", "") == "joyedit"])
        return aot_eager(graph, inputs)

    return found, backend


@pytest.mark.slow
def test_fullgraph_at_several_sizes(graphs, randn):
    found, backend = graphs
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for tokens in (3, 5, 7):
        given = [randn(2, tokens, 24), randn(2, tokens, 24), randn(24), randn(1, 3, 24)]
        given = [t.requires_grad_() for t in given]
        with ops.backend("triton"):
            out = compiled(*given)
        with ops.backend("torch"):
            wanted = block(*given)
        torch.testing.assert_close(out, wanted)
        ours, theirs = (torch.autograd.grad(t.square().mean(), given) for t in (out, wanted))
        torch.testing.assert_close(ours, theirs)
    assert found and all(kernels == OPERATIONS for kernels in found)


def test_a_change_of_backend_compiles_again(graphs, randn):
    found, backend = graphs
    compiled = torch.compile(lambda x, w: ops.rms_norm(x, w), fullgraph=True, backend=backend)
    x, weight = randn(2, 8), randn(8)
    for name in ("torch", "triton", "torch"):
        with ops.backend(name):
            compiled(x, weight)
    assert found == [[], ["rms_norm"]]
