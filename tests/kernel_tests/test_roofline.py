"""The counted bytes and floors, the timings' refusal of wrong results, and the table of docs/kernels.md."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from joyedit import ops
from joyedit.estimates.machines import Machine

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
op_cases = importlib.import_module("benchmarks.op_cases")
roofline = importlib.import_module("benchmarks.roofline")
timings = importlib.import_module("benchmarks.ops")
tables = importlib.import_module("benchmarks.tables")
sys.path.remove(str(ROOT))
T, Case, Op = op_cases.T, op_cases.Case, op_cases.Op


def plain(x, shift, scale):
    return (x * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


def case(dtype=torch.bfloat16, **kwargs):
    vector = T((1, 64), torch.float32)
    return Case("ada_layer_norm", "joyimage", "made up", (T((2, 8, 64), dtype), vector, vector), **kwargs)


def test_bytes_are_each_argument_and_result_once():
    x, vector = 2 * 8 * 64, 64
    found = roofline.traffic(case(), Op("", plain, (), op_cases.per_element(9)))
    assert found.fused == 2 * 2 * x + 2 * 4 * vector
    assert found.operations == 9 * x
    # 1 + scale; bf16 times fp32; plus fp32; to bf16.
    separate = 2 * 4 * vector + (2 + 4) * x + 4 * vector + 2 * 4 * x + 4 * vector + (4 + 2) * x
    assert (found.plain, found.launches) == (separate, 4)


def test_expanded_tensors_and_views_cost_nothing():
    assert roofline.stored([torch.empty(1, 64).expand(8, 64)]) == 4 * 64
    with roofline.Moved() as moved:
        torch.empty(4, 6, device="meta").view(3, 8).transpose(0, 1)[1:].unbind(1)
    assert (moved.bytes, moved.launches) == (0, 0)


def test_floor_is_the_longer_of_memory_and_arithmetic():
    gpu = Machine(bandwidth=1e12, matrix=1e15, vector=1e13)
    light, heavy = roofline.Traffic(10**9, 0, 0, 10**9), roofline.Traffic(10**6, 0, 0, 10**12)
    op = Op("", plain, (), op_cases.per_element(1))
    assert roofline.floor(light, op, gpu) == 1e-3
    assert roofline.floor(heavy, op, gpu) == 0.1
    assert roofline.floor(heavy, op._replace(matrix=True), gpu) == 1e-3


def test_every_case_has_a_row_and_fusing_never_costs(capsys, tmp_path):
    roofline.main(["--out", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())
    assert len(rows) == len(op_cases.all_cases()) == len({row["case"] for row in rows})
    for row in rows:
        assert row["case"][:78] in printed
        assert 0 < row["fused"] <= row["plain"] and row["operations"] > 0
        assert all(microseconds > 0 for microseconds in row["floors"].values())


def test_sum_of_a_step_and_what_a_block_saves():
    floors = dict.fromkeys(roofline.GPUS, 2.0)
    row = {"fused": 10, "plain": 25, "launches": 3, "operations": 7, "floors": floors}
    rows = [{**row, "case": case(per_step=80, per_block=2)}, {**row, "case": case(per_step=2)}]
    total = roofline.sums(rows, "joyimage")
    counts = total["fused"], total["plain"], total["calls"], total["launches"]
    assert counts == (820, 2050, 82, 246)
    assert total["floors"]["H100"] == pytest.approx(0.164)
    assert roofline.sums(rows, "chronoedit")["calls"] == 0
    assert roofline.saved_per_block(rows, "ada_layer_norm") == {"joyimage": 30}
    assert roofline.saved_per_block(rows, "rms_norm") == {}


def test_a_wrong_result_is_not_timed(monkeypatch):
    made = case().make("cpu")
    right = timings.call(case(), "torch")
    assert timings.check(case(), "torch", right, made) < 1e-2
    for wrong in (lambda *a: right(*a) * 1.02, lambda *a: right(*a) * float("nan")):
        with pytest.raises(timings.UnequalResults, match="from float64"):
            timings.check(case(), "torch", wrong, made)


def test_compiled_operations_are_the_plain_ones(monkeypatch):
    """On a GPU, "auto" would compile a call of our kernel. Nothing compiled for another case is left over."""
    done = []

    def compile(operation, dynamic, backend):
        return lambda *args: done.append(ops._backend) or operation(*args)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    compiled = timings.call(case(), "compile")
    assert timings.check(case(), "compile", compiled, case().make("cpu")) < 1e-2
    assert done == ["reset", "torch"] and ops._backend == "auto"


def test_some_heads_of_attention_are_held_against_float64():
    x, shared = T((1, 9, 6, 16), torch.bfloat16), T((1, 9, 2, 16), torch.bfloat16)
    made_up = Case("attention", "joyimage", "made up", ((x, x), (shared, shared), (shared, shared)))
    made, right = made_up.make("cpu"), timings.call(made_up, "torch")

    def wrong(*args):
        out = right(*args)
        out[:, :, 2] *= 1.1  # the last head that shares the first one of k
        return out

    assert timings.check(made_up, "torch", right, made) < 1e-2
    with pytest.raises(timings.UnequalResults, match="from float64"):
        timings.check(made_up, "torch", wrong, made)


def test_results_are_written_after_each_case(monkeypatch, tmp_path):
    def measure(cases, providers):
        for count in (1, 2):
            assert not torch.is_grad_enabled()
            yield {"rows": count}
        raise timings.UnequalResults("stop")

    monkeypatch.setattr(timings, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")
    with pytest.raises(timings.UnequalResults, match="stop"):
        timings.main(["--out", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == {"rows": 2}


def test_overhead_of_every_operation(tmp_path, capsys):
    results = timings.overhead(op_cases.all_ops(), calls=3)
    assert set(results["microseconds"]) == set(op_cases.all_ops())
    for pair in results["microseconds"].values():
        assert pair["triton"] > 0 and pair["torch"] > 0
    assert ops._backend == "auto" and not ops._interpreted
    committed = json.loads((timings.RESULTS / "overhead.json").read_text(encoding="utf-8"))
    missing = set(op_cases.all_ops()) ^ set(committed["microseconds"])
    assert not missing, "run: python -m benchmarks.ops --overhead"


def test_timing_without_a_gpu_says_so(capsys):
    if torch.cuda.is_available():
        return
    assert timings.main(["--provider", "torch"]) == 1
    assert "no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        timings.main(["--provider", "cuda"])


def test_table_of_the_kernels_has_every_operation():
    table = tables.kernel_table().splitlines()
    assert [line.split("`")[1] for line in table[2:]] == list(op_cases.all_ops())
    text = "a\n<!-- kernels -->\nold\n<!-- /kernels -->\nb\n"
    assert tables.filled(text) == f"a\n<!-- kernels -->\n{chr(10).join(table)}\n<!-- /kernels -->\nb\n"
    rows = [(f"x: {n} [forward]", {"sm_90": {"registers": n}}) for n in (40, 32)]
    assert tables.registers(rows, "sm_90") == "40"
    rows.append(("x: y [backward]", {"sm_90": {"registers": 99}}))
    assert tables.registers(rows, "sm_90") == "40 / 99"
    assert tables.registers([("x: y", {"sm_90": {"refused": "spills"}})], "sm_90") == "torch"


def test_what_a_block_of_joyimage_moves():
    """1024 x 1024 pixels, one reference: 9292 tokens of width 4096 in bf16; modulation in fp32."""
    tokens, vectors = 2 * 9292 * 4096, 4 * 4096
    now = roofline.block_bytes("joyimage")
    rope = 4 * 2 * 8192 * 64
    assert now == {
        "add": 2 * 6 * 4096 * (2 + 4 + 4),  # the tables of both streams in bf16, and the timestep
        "ada_layer_norm": 2 * tokens + 4 * vectors,
        "qk_norm_rope": 4 * tokens + rope + 4 * 128 * 2,
        "gate_residual_norm": 4 * tokens + 6 * vectors,
        "gate_residual": 3 * tokens + 2 * vectors,
    }
    assert sum(now.values()) < 1000e6
    before = roofline.block_bytes("joyimage", separate=True)
    assert before == {**now, "cat": 2 * 3 * tokens}


def test_what_a_block_of_chronoedit_moves():
    """5 frames of 720p: 7200 tokens of width 5120."""
    tokens = 2 * 7200 * 5120
    now, before = roofline.block_bytes("chronoedit"), roofline.block_bytes("chronoedit", separate=True)
    moved = {"ada_layer_norm": 2, "gate_residual_layer_norm": 4, "gate_residual_norm": 4, "gate_residual": 3}
    for name, count in moved.items():
        assert now[name] == pytest.approx(count * tokens, rel=0.01), name
    assert sum(before.values()) - sum(now.values()) == pytest.approx(tokens, rel=0.01)
    assert "cat" not in now and "clone" not in now and "copy_" not in now


def test_work_of_a_step_is_that_of_the_specification():
    """413 TFLOP a guided step at 1024 x 1024 pixels, counted there from the published config."""
    work = roofline.block_work("joyimage")
    assert 80 * (work.products + work.attention) == pytest.approx(413e12, rel=0.005)
    gpu = roofline.GPUS["H100"]
    assert roofline.floor_of_step("joyimage", gpu) < roofline.predicted_step("joyimage", gpu)
    assert roofline.predicted_step("joyimage", gpu) < roofline.predicted_step("joyimage", gpu, separate=True)
