"""The benchmarks run, refuse unequal results, and the pages show what they measured."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.random_checkpoint import write_random_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SIDE_BY_SIDE = ("chronoedit", "diffedit", "joyimage")
COMMITTED = [ROOT / "benchmarks" / "results" / f"{name}.json" for name in SIDE_BY_SIDE]


@pytest.fixture
def benchmark(monkeypatch):
    """Import a module of benchmarks/, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def check_rows(results, names):
    assert set(results["rows"]) == set(names)
    assert {"cpu", "cores", "threads", "torch", "diffusers", "transformers", "date"} <= set(
        results["machine"]
    )
    for name, row in results["rows"].items():
        assert row["title"] and row["shape"] and row["equal"], name
        assert row["reference"] > 0 and row["ours"] > 0 and row["load"] >= 0, name
        ratios = sorted(a / b for a, b in row["pairs"])
        assert ratios[0] * 0.99 <= row["ratio"] <= ratios[-1] * 1.01, name
        if row["difference"] is not None:
            assert row["difference"] <= row["tolerance"], name


@pytest.mark.slow
def test_quick_run(benchmark, tmp_path, capsys):
    side_by_side, joyimage = benchmark("side_by_side"), benchmark("joyimage")
    names = [
        "step_fp32",
        "block_fp32",
        "step_bf16",
        "prompt_pair",
        "vae_encode",
        "vae_decode",
        "edit",
        "load",
    ]
    out = tmp_path / "out.json"
    chosen = [argument for name in names for argument in ("--only", name)]
    side_by_side.main(joyimage.ROWS, "joyimage", ["--quick", "--out", str(out), *chosen])
    results = json.loads(out.read_text(encoding="utf-8"))
    check_rows(results, names)
    assert results["quick"] and all(row["met"] is None for row in results["rows"].values())
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:-1]] == names


@pytest.mark.slow
def test_quick_run_of_diffedit(benchmark, tmp_path):
    side_by_side, diffedit = benchmark("side_by_side"), benchmark("diffedit")
    names = ["mask", "mask_negatives", "unet_step", "invert", "denoise", "whole"]
    chosen = [argument for name in names for argument in ("--only", name)]
    side_by_side.main(diffedit.ROWS, "diffedit", ["--quick", "--out", str(tmp_path / "out.json"), *chosen])
    check_rows(json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), names)


@pytest.mark.slow
def test_quick_run_of_chronoedit(benchmark, tmp_path):
    side_by_side, chronoedit = benchmark("side_by_side"), benchmark("chronoedit")
    names = ["step", "text", "vision", "encode_5", "decode_29", "whole", "reasoning"]
    chosen = [argument for name in names for argument in ("--only", name)]
    side_by_side.main(
        chronoedit.ROWS, "chronoedit", ["--quick", "--out", str(tmp_path / "out.json"), *chosen]
    )
    check_rows(json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), names)


def test_a_wrong_network_is_refused(benchmark, monkeypatch, tmp_path):
    side_by_side, joyimage = benchmark("side_by_side"), benchmark("joyimage")
    right = joyimage.our_step
    monkeypatch.setattr(
        joyimage, "our_step", lambda *given: lambda: tuple(1.001 * x for x in right(*given)())
    )
    with torch.no_grad(), pytest.raises(side_by_side.UnequalResults, match="differ by"):
        joyimage.step_fp32(True, tmp_path)


def test_unequal_results_are_not_timed(benchmark):
    side_by_side = benchmark("side_by_side")
    x = torch.arange(6.0)
    calls = []

    def compare(*results):
        """Ours returns the given results one after the other, the last one from then on."""
        calls.clear()
        calls.extend([0, 0])

        def ours():
            calls[1] += 1
            return results[min(calls[1], len(results)) - 1]

        def reference():
            calls[0] += 1
            return x

        return side_by_side.compare(
            reference, ours, shape="", equal="", tolerance=1e-5, pairs=3, distance=side_by_side.difference
        )

    assert compare(x + 1e-6).difference == pytest.approx(2e-7, rel=0.2)
    assert calls == [4, 4]
    for wrong in (x + 1e-3, x[:5], x / 0, x * float("nan")):
        with pytest.raises(side_by_side.UnequalResults):
            compare(wrong)
        assert calls == [1, 1]
    with pytest.raises(side_by_side.UnequalResults, match="differ"):
        compare(x, x, x, x + 1e-3)
    with pytest.raises(side_by_side.UnequalResults, match="constant"):
        side_by_side.difference((x, torch.ones(3)), (x, torch.ones(3)))
    with pytest.raises(side_by_side.UnequalResults, match="1 results against 2"):
        side_by_side.difference((x,), (x, x))


def test_a_failing_child_says_why(benchmark):
    run_child = benchmark("side_by_side").run_child
    child = run_child(["-c", "print(sum(range(10**6)))"])
    assert child.output == "499999500000\n" and 0 < child.user_seconds <= 2 * child.seconds
    with pytest.raises(RuntimeError, match="no such thing"):
        run_child(["-c", "raise SystemExit('no such thing')"])


LOAD = """
import sys
from pathlib import Path
from joyedit.pipelines.joyimage import JoyImageEditPipeline
JoyImageEditPipeline.from_pretrained(sys.argv[1])
print(sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_loading_imports_no_compiler(benchmark, tmp_path):
    """Building on the meta device can do so by the way: a second, and 120 MB of the peak."""
    write_random_checkpoint(tmp_path)
    assert benchmark("side_by_side").run_child(["-c", LOAD, str(tmp_path)]).output == "[]\n"


# ---------------------------------------------------------------------------------------- what is committed
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_of_a_full_run(benchmark, path):
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["quick"] is False
    rows = set(benchmark(path.stem).ROWS)
    if not results["machine"]["bf16_units"]:
        rows -= {"step_bf16_avx2"}
    check_rows(results, rows)


def test_pages_show_the_committed_results(benchmark):
    tables = benchmark("tables")
    texts = [path.read_text(encoding="utf-8") for path in tables.pages()]
    for text in texts:
        assert tables.filled(text) == text, "run: python -m benchmarks.tables"
    shown = sorted(re.findall(r"<!-- (\w[\w:]*) -->", "\n".join(texts)))
    assert shown == sorted([*tables.TABLES, *(f"speed:{path.stem}" for path in COMMITTED)])


def test_tables_are_filled_in(benchmark, tmp_path):
    tables = benchmark("tables")
    row = {"title": "a row", "shape": "small", "reference": 2.0, "ours": 0.25, "ratio": 8.0, "unit": "s"}
    row |= {"expected": "9x", "met": False, "difference": 2e-7, "remark": "why"}
    machine = {name: name for name in ("date", "cpu", "threads", "torch", "diffusers", "transformers")}
    (tmp_path / "it.json").write_text(json.dumps({"machine": machine, "rows": {"row": row}}))
    text = "a\n<!-- speed:it -->\nold\n<!-- /speed:it -->\nb\n"
    once = tables.filled(text, tmp_path)
    assert "| a row (why) | small | 2 s | 250 ms | 8.00x | 9x (below) | 2e-07 |" in once
    assert once.startswith("a\n<!-- speed:it -->\n") and once.endswith("\n<!-- /speed:it -->\nb\n")
    assert "old" not in once and tables.filled(once, tmp_path) == once
    with pytest.raises(FileNotFoundError):
        tables.filled(text.replace("speed:it", "speed:other"), tmp_path)


def test_table_of_whole_edits(benchmark, tmp_path):
    tables = benchmark("tables")
    for ratio, (system, name) in enumerate(tables.WHOLE_EDITS.items(), start=1):
        row = {"shape": "small", "reference": 2.0, "ours": 0.25, "ratio": ratio, "unit": "s"}
        rows = {"other": {}, name: {**row, "difference": 0.0}}
        (tmp_path / f"{system}.json").write_text(json.dumps({"rows": rows}))
    filled = tables.filled("<!-- edits -->\n<!-- /edits -->", tmp_path).splitlines()
    assert filled[3:-1] == [
        "| JoyAI-Image-Edit: small | 2 s | 250 ms | 1.00x | 0 |",
        "| DiffEdit: small | 2 s | 250 ms | 2.00x | 0 |",
        "| ChronoEdit: small | 2 s | 250 ms | 3.00x | 0 |",
    ]


@pytest.fixture
def recorded(tmp_path):
    """Writes made-up results of the kernels `guide` of some releases of Triton, and of a GPU."""

    def write(kernels, gpus=()):
        files = {f"kernels/{version}/guide.json": {"rows": rows} for version, rows in kernels.items()}
        files |= {f"gpu/{i}.json": run for i, run in enumerate(gpus)}
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return write


def compiled(**changes):
    wide = {r"LDG\.E\.(\w+\.)*128": 2, "(global|buffer)_load_(b128|dwordx4)": 2}
    return {"launch": "*bf16", "registers": 40, "spills": 0, "shared": 64, "instructions": wide, **changes}


def test_tables_of_what_was_compiled(benchmark, recorded, monkeypatch):
    tables = benchmark("tables")
    good, spilling = compiled(), compiled(spills=12)
    results = recorded(
        {
            "3.10": {"guide: a [f]": {"sm_90": good, "gfx942": good}, "guide: b [f]": {"sm_90": good}},
            "3.4": {
                "guide: a [f]": {"sm_90": spilling, "gfx942": {"failed": "SIGABRT"}},
                "guide: b [f]": {"sm_90": compiled(spills=3, instructions={}), "gfx942": {"refused": "why"}},
                "guide: c [f]": {"sm_90": compiled(shared=2**20), "gfx942": good},
            },
        }
    )
    monkeypatch.setattr(tables, "computed", lambda gpu: f"{gpu} 1.00, 2.00 s")
    found = tables.gpu_table(results).splitlines()
    assert found[0] == "| GPU | Triton 3.4 | Triton 3.10 | computed: floor, prediction | measured |"
    sm_90 = "2 of 3, 2 spill, 1 lack an instruction | all 2 | H100 1.00, 2.00 s, H200 1.00, 2.00 s | no |"
    assert f"| H100, H200 (sm_90) | {sm_90}" in found
    assert "| MI300X (gfx942) | 1 of 2 | all 1 | MI300X 1.00, 2.00 s | no |" in found
    assert "| A100 (sm_80) | - | - | - | no |" in found
    assert tables.problem_table(results).splitlines()[2:] == [
        "| guide: a [f] | sm_90 | 12 spills | - |",
        "| guide: a [f] | gfx942 | does not compile | - |",
        r"| guide: b [f] | sm_90 | 3 spills, no instruction LDG\.E\.(\w+\.)*128 or LDGSTS | - |",
        "| guide: c [f] | sm_90 | 1048576 bytes of shared memory, there are 232448 | - |",
    ]
    recorded({"3.4": {"guide: a [f]": {"sm_90": good}}})
    assert tables.problem_table(results) == "Nothing under Triton 3.4, 3.10."


def test_tables_of_what_gpus_measured(benchmark, recorded, monkeypatch):
    tables = benchmark("tables")
    machine = {"hip": None, "date": "2027-01-01", "torch": "2.13", "triton": "3.9.0"}
    h200 = {**machine, "device": "NVIDIA H200", "capability": "9.0"}
    mi300 = {**machine, "device": "Instinct", "capability": "9.4", "hip": "7.0"}
    row = {"area": "step", "name": tables.STEP, "failed": None, "seconds": 0.614, "peak_bytes": 2**35}
    part = {"area": "block", "name": "a", "failed": None, "seconds": 2.5, "share_of_peak": 0.5}
    failed = {"area": "step", "name": tables.STEP, "failed": "out of memory"}
    absent = {"area": "step", "name": "b", "failed": None, "seconds": None, "why": "no diffusers"}
    others = [{"area": area, "name": "c", "failed": None} for area in ("calls", "step")]
    runs = [
        {"dry_run": False, "machine": h200, "rows": [row, part, *others]},
        {"dry_run": False, "machine": mi300, "rows": [failed, absent]},
        {"dry_run": True, "machine": {**mi300, "device": "made up"}, "rows": [row]},
    ]
    results = recorded({"3.9": {"guide: a [f]": {"sm_90": compiled(), "gfx942": compiled()}}})
    assert tables.measured_table(results) == "No GPU has measured this yet."
    recorded({}, runs)
    assert tables.measured_table(results).splitlines() == [
        "NVIDIA H200: 2027-01-01, torch 2.13, Triton 3.9.0; Instinct: 2027-01-01, torch 2.13, Triton 3.9.0.",
        "",
        "| measured | NVIDIA H200 | Instinct |",
        "| --- | ---: | ---: |",
        f"| step: {tables.STEP} | 614 ms, 32.0 GiB | failed |",
        "| block: a | 2.5 s, 50 % of peak | - |",
        "| step: b | - | no diffusers |",
    ]
    monkeypatch.setattr(tables, "computed", lambda gpu: gpu)
    found = tables.gpu_table(results).splitlines()
    assert "| H100, H200 (sm_90) | all 1 | H100, H200 | NVIDIA H200 0.61 s |" in found
    assert "| MI300X (gfx942) | all 1 | MI300X | Instinct, but no step |" in found
    assert "| RTX 50 (sm_120) | - | - | no |" in found


def test_computed_steps_are_between_the_floor_and_twice_of_it(benchmark):
    floor, predicted = map(float, re.findall(r"\d\.\d\d", benchmark("tables").computed("H200")))
    assert 0.3 < floor < predicted < 2 * floor
