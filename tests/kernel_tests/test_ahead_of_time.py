"""Every kernel, compiled for eight GPUs without one: what the committed results say, and that they are
current."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
op_cases = importlib.import_module("benchmarks.op_cases")
kernels_aot = importlib.import_module("benchmarks.kernels_aot")
sys.path.remove(str(ROOT))

FILES = sorted(op_cases.modules())
every_file = pytest.mark.parametrize("name", FILES)


@pytest.fixture(scope="module", autouse=True)
def compiler_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def test_every_kernel_has_cases_and_every_operation_of_them_is_called():
    without_kernels = {"shared", "attention_tiles"}
    assert FILES == sorted({path.stem for path in (ROOT / "kernels").glob("*.py")} - without_kernels)
    for module in op_cases.modules().values():
        assert {case.op for case in module.CASES} == set(module.OPS)


@every_file
def test_committed_results_are_of_the_kernels_as_they_are(name):
    assert not kernels_aot.stale(name), f"run: python -m benchmarks.kernels_aot {name}"


@every_file
def test_committed_results_have_no_spills_and_fit(name):
    module, results = op_cases.modules()[name], kernels_aot.read(name)
    checked = 0
    for row, entries in kernels_aot.table(module).items():
        op = module.OPS[row.partition(":")[0]]
        for target, entry in entries.items():
            if not isinstance(entry, str):
                result = results[row][target]
                assert kernels_aot.problems(op, entry, target, result) == [], (row, target)
                checked += 1
    assert checked >= len(kernels_aot.TARGETS) // 2, "refused nearly everywhere"


def test_results_have_a_kernel():
    assert {path.stem for path in kernels_aot.RESULTS.glob("*.json")} - {"overhead"} == set(FILES)


def compile_and_compare(module, name, row, target, entry):
    result = kernels_aot.compiled(entry, target)
    op = module.OPS[row.partition(":")[0]]
    assert kernels_aot.problems(op, entry, target, result) == [], (row, target)
    committed = json.loads((kernels_aot.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    if committed["triton"] == kernels_aot.triton.__version__:
        expected = committed["rows"][row][target]
        assert {key: expected[key] for key in result} == result, (row, target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_one_kernel_compiles_for_each_vendor(target):
    """The whole table is slow."""
    name = FILES[list(kernels_aot.TARGETS).index(target) % len(FILES)]
    module = op_cases.modules()[name]
    entries = [(row, found[target]) for row, found in kernels_aot.table(module).items() if target in found]
    row, entry = next((row, entry) for row, entry in entries if not isinstance(entry, str))
    compile_and_compare(module, name, row, target, entry)


@pytest.mark.slow
@every_file
def test_whole_table_compiles(name):
    module = op_cases.modules()[name]
    for row, entries in kernels_aot.table(module).items():
        for target, entry in entries.items():
            if not isinstance(entry, str):
                compile_and_compare(module, name, row, target, entry)


def test_a_changed_kernel_or_tile_is_noticed(monkeypatch):
    from joyedit.kernels import rms_norm

    tile = rms_norm.tile
    monkeypatch.setattr(rms_norm, "tile", lambda width: {**tile(width), "num_warps": 2})
    assert len(kernels_aot.stale("rms_norm")) >= len(kernels_aot.TARGETS)
    monkeypatch.undo()
    monkeypatch.setattr(rms_norm.backward, "_src", rms_norm.backward.src.replace("normed * along", "normed"))
    assert len(kernels_aot.stale("rms_norm")) >= len(kernels_aot.TARGETS)


def test_tiles_are_those_of_the_gpu():
    """Instinct's warps are twice as wide, so half as many hold a row."""
    case = op_cases.modules()["rms_norm"].CASES[0]
    found = {}
    for target in ("sm_90", "gfx942"):
        with kernels_aot.launches_on(target) as launches:
            kernels_aot.call(case)
        (found[target],) = launches
    assert found["sm_90"].options["num_warps"] == 2 * found["gfx942"].options["num_warps"]
    assert torch.version.hip is None or torch.cuda.is_available()


def test_what_is_wrong_is_named():
    module = op_cases.modules()["rms_norm"]
    row, entries = next(iter(kernels_aot.table(module).items()))
    good = kernels_aot.read("rms_norm")[row]["sm_90"]
    op = module.OPS["rms_norm"]

    def problems(**changes):
        return kernels_aot.problems(op, entries["sm_90"], "sm_90", good | changes)

    assert problems() == []
    assert problems(spills=8) == ["8 spills"]
    assert "bytes of shared memory" in problems(shared=232449)[0]
    assert problems(instructions={"all": 9}) == [r"no instruction LDG\.E\.(\w+\.)*128"]
