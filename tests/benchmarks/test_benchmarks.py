"""The benchmarks run, refuse unequal results, and the pages show what they measured."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.random_checkpoint import write_random_checkpoint

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


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
    assert shown == sorted(["edits", "kernels", "small", *(f"speed:{path.stem}" for path in COMMITTED)])


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
