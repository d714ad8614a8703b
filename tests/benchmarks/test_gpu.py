"""The benchmark on a GPU: what it writes when all is well, and when rows fail, hang, crash or have no time.

The areas of most tests are made up, and their processes are copies of this one, which takes no time to start.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ops as timings
from benchmarks import side_by_side
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import calls, correctness, hazards, processes
from benchmarks.gpu import machine as machine_area
from benchmarks.gpu.setting import Setting
from benchmarks.op_cases import Case, all_cases, all_ops, exact_cases, exact_ops, made
from joyedit import ops

ROOT = Path(__file__).resolve().parents[2]
DRY, REAL = Setting(torch.device("cpu"), True), Setting(torch.device("cuda"), False)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs the benchmark with made-up areas: name -> {name of a row: what measures it}.
    Gives the exit status and the rows of the file."""
    monkeypatch.setattr(processes, "CONTEXT", processes.multiprocessing.get_context("fork"))
    monkeypatch.setattr(machine_area, "described", lambda setting: {"cores": 4, "device": "made up"})
    monkeypatch.setattr(processes, "gc", SimpleNamespace(collect=lambda: 0))  # of all that pytest has, slow
    path = tmp_path / "folder" / "gpu.json"

    def run(areas, *arguments, parallel=()):
        known = {}
        for name, rows in areas.items():
            module = SimpleNamespace(rows=rows if callable(rows) else lambda s, rows=rows: iter(rows.items()))
            monkeypatch.setitem(sys.modules, f"made_up.{name}", module)
            known[name] = gpu.Area(f"made_up.{name}", 1, name in parallel)
        monkeypatch.setattr(gpu, "AREAS", known)
        status = gpu.main(["--dry-run", "--out", str(path), *arguments])
        written = json.loads(path.read_text())
        assert written["dry_run"] is True and written["machine"]["device"] == "made up"
        return status, written["rows"]

    run.path = path
    return run


def fail():
    raise ValueError("not this one")


def test_rows_are_written_as_they_come(run, monkeypatch, capsys):
    write, whole = gpu.write, []

    def seen(path, results):
        write(path, results)
        whole.append(len(json.loads(path.read_text())["rows"]))
        assert sorted(path.parent.iterdir()) == [path], "nothing else is left in the folder"

    monkeypatch.setattr(gpu, "write", seen)
    status, rows = run({"one": {"a": lambda: {"seconds": 0.5}, "b": lambda: {"x": [1]}}, "two": {"c": dict}})
    assert status == 0 and whole == [0, 1, 2, 3]
    assert rows == [
        {"area": "one", "name": "a", "failed": None, "seconds": 0.5},
        {"area": "one", "name": "b", "failed": None, "x": [1]},
        {"area": "two", "name": "c", "failed": None},
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "one: a: seconds 0.5" and printed[-1].endswith("3 rows, 0 failed")


def test_a_file_is_replaced_or_left_as_it_is(monkeypatch, tmp_path):
    path = tmp_path / "out.json"
    gpu.write(path, {"rows": []})
    with path.open() as before:
        gpu.write(path, {"rows": [1]})
        assert json.load(before) == {"rows": []}, "who reads it meanwhile has the old one, whole"

    def full(self, text, **options):
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        gpu.write(path, {"rows": [1, 2]})
    assert json.loads(path.read_text()) == {"rows": [1]}


def test_a_row_that_fails_stops_no_other(run):
    bad = {
        "raises": fail,
        "not a number": lambda: {"seconds": math.nan},
        "no figure": lambda: {"seconds": torch.ones(1)},
        "ends the process": lambda: os._exit(7),
        "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    }
    status, rows = run({"one": {**bad, "good": lambda: {"x": 1}}, "two": {"other": lambda: {"x": 2}}})
    assert status == 1 and [row["name"] for row in rows] == [*bad, "good", "other"]
    reasons = [row["failed"] for row in rows]
    assert reasons[0] == "ValueError: not this one"
    assert "ValueError" in reasons[1] and "TypeError" in reasons[2]
    assert reasons[3:5] == [f"the process ended with exit code {code}" for code in (7, -9)]
    assert reasons[5:] == [None, None] and [row["x"] for row in rows[5:]] == [1, 2]


def test_a_device_that_is_broken_takes_the_process_and_no_more(run, monkeypatch):
    """As CUDA after an illegal address: whatever waits for the device raises from then on."""
    monkeypatch.setattr(Setting, "finish", lambda setting: fail() if os.environ.get("BROKEN") else None)
    pids = lambda: {"pid": os.getpid()}  # noqa: E731
    status, rows = run(
        {"one": {"a": pids, "breaks": lambda: os.environ.update(BROKEN="1") or {}, "b": pids, "c": pids}}
    )
    assert status == 1
    assert [row["failed"] for row in rows] == [None, "ValueError: not this one", None, None]
    assert rows[0]["pid"] != rows[2]["pid"] == rows[3]["pid"]


def test_an_area_that_cannot_list_its_rows(run):
    def half(setting):
        yield "a", dict
        raise ValueError("no more")

    areas = {"broken": half, "dead": lambda setting: os._exit(1), "good": {"b": dict}}
    status, rows = run(areas)
    assert status == 1 and [(row["area"], row["name"]) for row in rows] == [
        ("broken", "a"),
        ("broken", "the rows of the area"),
        ("dead", "the rows of the area"),
        ("good", "b"),
    ]
    assert [row["failed"] is None for row in rows] == [True, False, False, True]


def test_parallel_rows_are_each_measured_once(run):
    def pid():
        time.sleep(0.05)
        return {"pid": os.getpid()}

    rows = {str(i): pid if i != 4 else lambda: os._exit(1) for i in range(9)}
    status, found = run({"many": rows, "one": {"last": pid}}, parallel=["many"])
    assert status == 1 and found[-1]["area"] == "one"
    assert sorted(row["name"] for row in found[:-1]) == list(rows)
    assert [row["name"] for row in found if row["failed"]] == ["4"]
    assert len({row["pid"] for row in found[:-1] if "pid" in row}) == 3, "two processes and a successor"


@pytest.fixture
def clock(monkeypatch):
    """The clock of all processes, which stands still until a row takes time: `clock(seconds)` is one."""
    now = processes.CONTEXT.Value("d", 0.0)
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: now.value))
    monkeypatch.setattr(gpu, "time", processes.time)

    def takes(seconds, hangs=False):
        def row():
            now.value += seconds
            if hangs:
                signal.pause()
            return {}

        return row

    return takes


def test_time_that_is_spent(run, clock):
    """A row may take a quarter of the budget, the first area half of it, but for the reserve."""
    one = {"hangs": clock(0.5, hangs=True), **{str(i): clock(0.2) for i in range(5)}}
    two = {"first": clock(0.5), "second": clock(0.4), "third": clock(0.1)}
    status, found = run({"one": one, "two": two}, "--budget", "2")
    assert status == 1 and [row["name"] for row in found] == [*one, *two]
    spent = "left out: the time was spent"
    reasons = [row["failed"] for row in found]
    assert reasons == ["given up after 0.5 s", *[None] * 3, *[spent] * 2, *[None] * 2, spent]


def test_nothing_goes_on_when_all_time_is_over(run, clock):
    areas = {"one": {"hangs": clock(1, hangs=True), "b": dict}, "two": {"c": dict}}
    status, found = run(areas, "--budget", "0.1")
    assert status == 1 and [row["name"] for row in found] == ["hangs", "b", "c"]
    assert {row["failed"] for row in found} == {"left out: the time was spent"}


def test_an_interruption_leaves_what_was_measured(run, capsys):
    def interrupt():
        while not json.loads(run.path.read_text())["rows"]:
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(100)

    status, rows = run({"one": {"a": dict, "b": interrupt, "c": dict}})
    assert status == 130 and [row["name"] for row in rows] == ["a"]
    assert "the 1 rows that were done" in capsys.readouterr().err


def test_only_some_areas(run, capsys):
    areas = {name: {name: dict} for name in ("one", "two", "three")}
    status, rows = run(areas, "--only", "three,one")
    assert status == 0 and [row["area"] for row in rows] == ["one", "three"], "in the order of their value"
    with pytest.raises(SystemExit) as stopped:
        run(areas, "--only", "one,four")
    assert stopped.value.code == 2
    assert "unknown area 'four': there are one, two, three" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert "only --dry-run works here" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_areas_in_order():
    order = ["machine", "correctness", "calls", "block", "step", "models", "hazards", "tiles"]
    assert list(gpu.AREAS) == order
    large = {"cores": 16, "memory": 141 * 2**30}
    assert gpu.parallel(large, False) == 7 and gpu.parallel({**large, "memory": 24 * 2**30}, False) == 1


def test_a_package_that_is_not_there_is_null(monkeypatch):
    installed = side_by_side.importlib.metadata.version

    def version(name):
        if name in ("diffusers", "transformers"):
            raise side_by_side.importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(side_by_side.importlib.metadata, "version", version)
    found = side_by_side.machine()
    assert found["diffusers"] is None and found["transformers"] is None
    assert found["torch"] == installed("torch")


# ------------------------------------------------------------------------------------------- what is measured
def test_all_calls_of_a_step_by_all_providers():
    titles = {case.title for case in all_cases() if case.per_step}
    assert {case.title for case in calls.cases(REAL)} == titles and len(titles) >= 52
    for case in calls.cases(REAL):
        names = set(calls.providers(case, REAL)) - {"liger"}
        attention = {"triton", "sdpa-cudnn", "sdpa-flash"} if case.op == "attention" else set()
        assert names == {"auto", "torch", "compile"} | attention
    assert {case.op for case in calls.cases(DRY)} == {case.op for case in all_cases() if case.per_step}


def test_odd_calls_and_situations_are_of_all_operations():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = correctness.odd(dtype)
        assert {case.op for case in found} == set(exact_ops())
        assert all(case.make("meta", fill=False)[0] is not None for case in found)
    assert {case.op for case in hazards.calls(DRY)} == set(exact_ops())
    names = [name for name, _ in correctness.rows(REAL)]
    assert len(set(names)) == len(names) and {case.title for case in exact_cases()} <= set(names)


def test_offsets_are_beyond_31_bits():
    for case, count in hazards.beyond_31_bits(REAL):
        args = timings.tree_leaves(case.make("meta", fill=False))
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        last = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors]
        assert max(last) > 2**31, case.title
        assert max(t.shape.count(count) for t in tensors) == 1, "the end of one axis is taken"


def test_stock_attention_computes_what_ours_does():
    """Joined, summed and packed, as `joyedit.ops` defines it."""
    known = [correctness.sized(case, DRY) for case in exact_cases()]
    for case in (*correctness.odd(torch.float32), *known):
        if case.op == "attention" and "prefix" not in case.what:
            function = calls.by_sdpa(torch.nn.attention.SDPBackend.MATH)
            assert timings.check(case, "sdpa", function, case.make("cpu")) < 1e-2


def test_a_wrong_gradient_is_refused(monkeypatch):
    """That of our kernel is 0.1 too large; its result is right."""
    right, case, chosen = ops.gelu_tanh, Case("gelu_tanh", "x", "y", all_ops()["gelu_tanh"].small), []

    def gelu_tanh(x):
        return right(x) + (0.1 if chosen[-1] == "triton" else 0) * (x - x.detach())

    monkeypatch.setattr(ops, "backend", lambda name: chosen.append(name) or contextlib.nullcontext())
    assert correctness.check_gradients(case, case.make("cpu")) < 0.01
    monkeypatch.setattr(ops, "gelu_tanh", gelu_tanh)
    with pytest.raises(side_by_side.UnequalResults, match="gelu_tanh: x, y: the gradient is"):
        correctness.check_gradients(case, case.make("cpu"))


@pytest.fixture
def timed_on_a_cpu(monkeypatch):
    """The benchmark of the operations as on a GPU, with tiny cases and without a clock."""
    small = [Case(name, "small", "case", all_ops()[name].small, 1) for name in ("rms_norm", "swiglu")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")
    monkeypatch.setattr(Case, "make", lambda case, device: made(case.args, "cpu"))
    monkeypatch.setattr(timings, "all_cases", lambda: small)
    monkeypatch.setattr(timings, "timed", lambda function, args: 0.5)
    return monkeypatch


def test_a_wrong_operation_is_written_down_and_the_others_are_timed(timed_on_a_cpu, tmp_path, capsys):
    right = timings.call

    def call(case, provider):
        function = right(case, "torch")
        if (case.op, provider) == ("rms_norm", "triton"):
            return lambda *args: 1.1 * function(*args)
        if (case.op, provider) == ("swiglu", "compile"):
            return lambda *args: fail()
        return function

    timed_on_a_cpu.setattr(timings, "call", call)
    path = tmp_path / "out.json"
    assert timings.main(["--out", str(path)]) == 1
    rows = json.loads(path.read_text())["rows"]
    failed = {(title, name): result["failed"] for title, row in rows.items() for name, result in row.items()}
    assert len(failed) == 6
    wrong = {key: failed.pop(key) for key in list(failed) if failed[key] is not None}
    assert list(wrong) == [("rms_norm: small, case", "triton"), ("swiglu: small, case", "compile")]
    assert "from float64, torch is" in list(wrong.values())[0] and "not this one" in list(wrong.values())[1]
    for title, name in failed:
        assert rows[title][name]["seconds"] == 0.5 and rows[title][name]["bytes_per_second"] > 0
    assert "seconds" not in rows["rms_norm: small, case"]["triton"]
    assert "failed: rms_norm: small, case: triton; swiglu: small, case: compile" in capsys.readouterr().err


def test_bytes_of_a_result_that_is_given():
    q, weight, out = torch.ones(2, 3, 2, 4), torch.ones(4), (torch.ones(2, 3, 2, 4), torch.ones(2, 3, 2, 4))
    args = q, q.clone(), weight, weight.clone(), None
    assert timings.fused_bytes(args, ops.qk_norm_rope(*args)) == 4 * (4 * q.numel() + 8)
    args = (*args, 1e-6, False, 0, out)
    assert timings.fused_bytes(args, ops.qk_norm_rope(*args)) == 4 * (4 * q.numel() + 8)


def test_operations_that_are_all_right(timed_on_a_cpu, tmp_path):
    timed_on_a_cpu.setattr(timings, "call", lambda case, provider, right=timings.call: right(case, "torch"))
    assert timings.main(["--out", str(tmp_path / "out.json"), "--provider", "torch,triton"]) == 0


# ----------------------------------------------------------------------------------------------- the real one
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"diffusers", "transformers", "peft", "accelerate", "scipy", "pytest"}:
            raise ModuleNotFoundError(f"no module named {name!r}, and none is needed")

sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.slow
def test_dry_run_with_what_joyedit_needs_and_no_more(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    needs = subprocess.run(
        [sys.executable, "-c", "import diffusers"], env=env, capture_output=True, text=True
    )
    assert "and none is needed" in needs.stderr
    path, areas = tmp_path / "gpu.json", "machine,correctness,calls,hazards"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--only", areas, "--out", str(path)]
    command += ["--budget", "1800"]  # other tests run beside it
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    written = json.loads(path.read_text())
    rows = written["rows"]
    assert [row for row in rows if row["failed"] is not None] == []
    assert done.returncode == 0
    assert written["dry_run"] is True and written["machine"]["device"] == "cpu"
    assert written["machine"]["torch"] == torch.__version__
    by_area = {area: [row for row in rows if row["area"] == area] for area in areas.split(",")}
    assert sum(map(len, by_area.values())) == len(rows) == len({(row["area"], row["name"]) for row in rows})
    operations = {row["name"].partition(":")[0] for row in by_area["correctness"]}
    assert operations == set(exact_ops())
    errors = [value for row in rows for key, value in row.items() if key in ("error", "gradient_error")]
    assert all(0 <= error < 0.01 for error in errors) and sum(error > 0 for error in errors) > len(errors) / 2
    assert len(by_area["calls"]) == sum(len(calls.providers(case, DRY)) for case in calls.cases(DRY))
    assert all(row["kernel_seconds"] > 0 and row["call_seconds"] > 0 for row in by_area["calls"])
    assert len(by_area["hazards"]) == len(list(hazards.rows(DRY)))
    assert {row["backend"] for row in by_area["machine"] if "backend" in row} <= {"FLASH_ATTENTION", "MATH"}
    assert done.stdout.count("\n") == len(rows) + 1, "a line for each row, and one at the end"
