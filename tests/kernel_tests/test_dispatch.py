"""Which implementation an operation chooses, and that nothing falls back unseen."""

import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from joyedit import ops

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
op_cases = importlib.import_module("benchmarks.op_cases")
sys.path.remove(str(ROOT))


@pytest.fixture(autouse=True)
def auto():
    """Every test starts from, and leaves, the default."""
    with ops.backend("auto"):
        yield


def tensor(device="cuda", dtype=torch.bfloat16, requires_grad=False, width=64):
    """What the choice looks at."""
    kind, _, index = device.partition(":")
    return SimpleNamespace(
        device=torch.device(kind, int(index or 0)),
        is_cuda=kind == "cuda",
        dtype=dtype,
        requires_grad=requires_grad,
        shape=(2, width),
    )


def test_backend_is_set_and_brought_back():
    assert ops._backend == "auto"
    with ops.backend("torch"):
        assert ops._backend == "torch"
        with ops.backend("triton"):
            assert ops._backend == "triton"
        assert ops._backend == "torch"
    ops.backend("triton")
    assert ops._backend == "triton"
    with pytest.raises(RuntimeError, match="stop"), ops.backend("torch"):
        raise RuntimeError("stop")
    assert ops._backend == "triton"


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'cuda': wanted one of auto, triton, torch"):
        ops.backend("cuda")
    assert ops._backend == "auto"


FROM_THE_ENVIRONMENT = """
import os
os.environ["JOYEDIT_OPS"] = "fast"
try:
    import joyedit.ops
except ValueError as error:
    print(error)
os.environ["JOYEDIT_OPS"] = "torch"
import joyedit.ops
print(joyedit.ops._backend)
"""


def test_environment_variable():
    command = [sys.executable, "-c", FROM_THE_ENVIRONMENT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "backend 'fast': wanted one of auto, triton, torch\ntorch\n", done.stderr


def test_auto_takes_the_kernel_for_what_it_supports():
    assert ops._triton(tensor(), tensor(dtype=torch.float32), None)
    assert ops._triton(tensor(requires_grad=True))
    refused = [
        (tensor("cpu"),),
        (tensor(dtype=torch.float64),),
        (tensor(), tensor(dtype=torch.float64)),
        (tensor(), tensor("cpu")),
        (tensor(), tensor("cuda:1")),
    ]
    for tensors in refused:
        assert not ops._triton(*tensors)
    assert not ops._triton(tensor(), problem="why not")
    assert not ops._triton(tensor(), tensor(requires_grad=True), has_backward=False)
    with torch.no_grad():
        assert ops._triton(tensor(), tensor(requires_grad=True), has_backward=False)
    with ops.backend("torch"):
        assert not ops._triton(tensor())


def test_triton_says_why_it_cannot_run(monkeypatch):
    ops.backend("triton")
    assert ops._triton(tensor())
    reasons = {
        "on cpu:0, not on a CUDA or ROCm device": (tensor("cpu"),),
        "not torch.float64": (tensor(), tensor(dtype=torch.float64)),
        "are on cuda:0 and cpu:0": (tensor(), tensor("cpu")),
    }
    for reason, tensors in reasons.items():
        with pytest.raises(RuntimeError, match=reason):
            ops._triton(*tensors)
    with pytest.raises(RuntimeError, match="longer than 16384"):
        ops._triton(tensor(), problem=ops._too_wide(tensor(width=16385)))
    with pytest.raises(RuntimeError, match="no backward"):
        ops._triton(tensor(requires_grad=True), has_backward=False)
    monkeypatch.setattr(ops, "_no_triton", "the package triton is not installed")
    with pytest.raises(RuntimeError, match="triton is not installed"):
        ops._triton(tensor())
    with ops.backend("auto"):
        assert not ops._triton(tensor())


def test_an_old_or_absent_triton_is_a_reason(monkeypatch):
    versions = {}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert ops._find_triton() is None, "no known package: taken for new"
    for name in ("triton-rocm", "pytorch-triton-rocm", "pytorch-triton", "triton"):
        versions[name] = "3.2.0+git1"
        assert ops._find_triton() == "triton 3.2 is older than 3.4"
        versions[name] = "3.10.0"
        assert ops._find_triton() is None
    versions["triton"] = "unknown"
    assert ops._find_triton() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ops._find_triton() == "the package triton is not installed"


@pytest.mark.parametrize("name", op_cases.all_ops())
def test_every_operation_asks(name):
    """No operation takes PyTorch without having asked whether a kernel can run."""
    args = op_cases.made(op_cases.all_ops()[name].small, "cpu")
    getattr(ops, name)(*args)
    with ops.backend("triton"), pytest.raises(RuntimeError, match="not on a CUDA or ROCm device"):
        getattr(ops, name)(*args)


def test_every_kernel_is_in_the_test_above():
    code = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py"))
    found = set(re.findall(r"\s(\w+) = torch\.ops\.joyedit\.\1\.default", code))
    assert found == {*op_cases.all_ops(), "qk_norm_rope_out"}, "the last one is qk_norm_rope with `out`"


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """Operations choose for CPU tensors as on an H100; `launch` of the result stands for every launch."""
    from triton.runtime.jit import JITFunction

    from joyedit.kernels import attention

    state = SimpleNamespace(launches=0, error=None)

    def launch(*args, **kwargs):
        state.launches += 1
        if state.error is not None:
            raise state.error

    monkeypatch.setattr(ops, "_on_gpu", lambda x: True)
    monkeypatch.setattr(ops, "_problem", lambda tensors, has_backward: None)
    monkeypatch.setattr(ops, "_product_ends_in_gelu", lambda *tensors: False)
    monkeypatch.setattr(ops, "_unbuilt", {})
    monkeypatch.setattr(attention, "family", lambda device: "sm_80")
    monkeypatch.setattr(JITFunction, "run", launch)
    return state


@pytest.mark.parametrize("name", op_cases.all_ops())
def test_auto_goes_on_where_a_kernel_cannot_be_built(name, as_if_on_a_gpu, caplog):
    args = op_cases.made(op_cases.all_ops()[name].small, "cpu")
    with ops.backend("torch"):
        wanted = getattr(ops, name)(*args)
    with torch.no_grad():
        as_if_on_a_gpu.error = RuntimeError("Failed to find C compiler.")
        torch.testing.assert_close(getattr(ops, name)(*args), wanted, equal_nan=True)
        tried = as_if_on_a_gpu.launches
        assert tried, "no kernel was tried"
        torch.testing.assert_close(getattr(ops, name)(*args), wanted, equal_nan=True)
        assert as_if_on_a_gpu.launches == tried, "it was tried again"
        (said,) = caplog.messages
        assert name in said and "PyTorch computes it" in said and "Failed to find C compiler." in said
        with ops.backend("triton"), pytest.raises(RuntimeError, match="Failed to find C compiler"):
            getattr(ops, name)(*args)


def test_one_reason_is_said_once(as_if_on_a_gpu, caplog):
    as_if_on_a_gpu.error = RuntimeError("Failed to find C compiler.")
    with torch.no_grad():
        for name, op in op_cases.all_ops().items():
            getattr(ops, name)(*op_cases.made(op.small, "cpu"))
    assert len(caplog.messages) == 1


def test_results_written_to_given_memory_are_those_of_pytorch(as_if_on_a_gpu):
    """Also where the kernel that writes them cannot be built: places are filled, nothing is joined."""
    as_if_on_a_gpu.error = RuntimeError("Failed to find C compiler.")
    image, text = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    weight, bias, norm = torch.randn(16, 16), torch.randn(16), torch.randn(8)
    with torch.no_grad():
        (q1, k1, v1), (q2, k2, v2) = ops.joint_buffers(3, image, text, 2)
        for x, q, k, v in ((image, q1, k1, v1), (text, q2, k2, v2)):
            assert ops.linear_into(v, x, weight, bias) is v
            torch.testing.assert_close(v.flatten(2), ops.linear(x, weight, bias))
            heads = x.unflatten(-1, (2, 8))
            assert ops.qk_norm_rope(heads, 2 * heads, norm, norm, None, out=(q, k)) == (q, k)
            wanted = ops.qk_norm_rope(heads, 2 * heads, norm, norm, None)
            torch.testing.assert_close((q, k), wanted)
        joined = ops._unsplit((v1, v2))
        assert len(joined) == 1 and joined[0].data_ptr() == v1.data_ptr()
        assert torch.equal(joined[0], torch.cat((v1, v2), dim=1))
        assert len(ops._unsplit((v1, v1))) == len(ops._unsplit((v2, v1))) == len(ops._unsplit((q1, k2))) == 2
        assert len(ops._unsplit((v1[:, :-1], v2))) == len(ops._unsplit((v1, v2[:, :-1]))) == 2
        segments = (q1, q2), (k1, k2), (v1, v2)
        whole = (torch.cat(parts, dim=1) for parts in segments)
        torch.testing.assert_close(ops.attention(*segments), ops.attention(*whole))
    assert ops.joint_buffers(3, image, text, 2) == (None, None), "a gradient may be wanted"


def test_what_is_no_failure_to_build_is_raised(as_if_on_a_gpu):
    x, weight = torch.randn(2, 8), torch.randn(8)
    with torch.no_grad():
        for error in (torch.OutOfMemoryError("out of memory"), KeyboardInterrupt()):
            as_if_on_a_gpu.error = error
            with pytest.raises(type(error)):
                ops.rms_norm(x, weight)
    assert not ops._unbuilt


@pytest.mark.gpu
def test_auto_launches_on_a_gpu(launches):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from joyedit.kernels.attention import no_tiles

    for name, op in op_cases.all_ops().items():
        args = op_cases.made(op.small, "cuda")
        with launches() as counts:
            getattr(ops, name)(*args)
        assert counts == ({} if name == "attention" and no_tiles(args[0].device) else {name: 1})
