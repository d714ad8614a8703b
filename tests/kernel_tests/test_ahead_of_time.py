"""Every kernel, compiled for eight GPUs without one, under three releases of Triton: what the committed
results say, that they are current, and, for the release that is installed, that they are what comes out.

The hash in the results does not depend on Triton, so that all of them are held to be current with any one.
"""

import faulthandler
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
op_cases = importlib.import_module("benchmarks.op_cases")
compiled_kernels = importlib.import_module("benchmarks.compiled_kernels")
kernels_aot = importlib.import_module("benchmarks.kernels_aot")
sys.path.remove(str(ROOT))

FILES = sorted(op_cases.modules())
VERSIONS = compiled_kernels.versions()
NEWEST = VERSIONS[-1]
SHARED = {"shared", "attention_tiles"}  # what files of kernels/ import: no operation
every_file = pytest.mark.parametrize("name", FILES)
every_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture(scope="module", autouse=True)
def compiler_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def test_every_kernel_has_cases_and_every_operation_of_them_is_called():
    assert set(FILES) == {path.stem for path in (ROOT / "kernels").glob("*.py")} - SHARED
    for module in op_cases.modules().values():
        assert {case.op for case in module.CASES} == set(module.OPS)


def test_there_are_results_of_three_releases_of_triton():
    assert VERSIONS[:2] == ["3.4", "3.6"] and len(VERSIONS) == 3
    for version in VERSIONS:
        paths = list((kernels_aot.RESULTS / version).glob("*.json"))
        assert {path.stem for path in paths} == set(FILES)
        for path in paths:
            recorded = json.loads(path.read_text(encoding="utf-8"))["triton"]
            assert recorded.startswith(f"{version}."), path


@every_version
@every_file
def test_committed_results_are_of_the_kernels_as_they_are(name, version):
    assert not kernels_aot.stale(name, version), f"under Triton {version}: benchmarks.kernels_aot {name}"


@every_file
def test_under_the_newest_triton_nothing_spills_and_all_fits(name):
    assert compiled_kernels.all_problems(name, NEWEST) == []
    entries = [entry for row in compiled_kernels.read(name, NEWEST).values() for entry in row.values()]
    assert sum("registers" in entry for entry in entries) > len(entries) / 2, "refused nearly everywhere"


@every_version
def test_what_spills_or_fails_is_in_the_documents(version):
    """Counted in the files themselves, not by the code that fills in the table."""
    lines = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines()
    for name in FILES:
        for row, entries in compiled_kernels.read(name, version).items():
            for target, entry in entries.items():
                said = "does not compile" if "failed" in entry else f"{entry.get('spills', 0)} spills"
                if said != "0 spills":
                    call = row.replace("|", "\\|")
                    listed = [line for line in lines if f"| {call} | {target} |" in line]
                    assert len(listed) == 1, (row, target)
                    assert said in listed[0].split("|")[3 + VERSIONS.index(version)], (row, target)


def recorded_by_this_triton(name):
    path = kernels_aot.RESULTS / kernels_aot.VERSION / f"{name}.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["triton"] == triton.__version__


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_one_kernel_compiles_for_each_vendor(target):
    """The whole table is slow."""
    name = FILES[list(kernels_aot.TARGETS).index(target) % len(FILES)]
    rows = kernels_aot.table(op_cases.modules()[name])
    row, entry = next(
        (row, entries[target])
        for row, entries in rows.items()
        if isinstance(entries.get(target), kernels_aot.Launch)
    )
    result = kernels_aot.compiled(entry, target, {})
    assert result["registers"] > 16 and result["instructions"]["all"] > 50
    if recorded_by_this_triton(name):
        assert result.items() <= compiled_kernels.read(name, kernels_aot.VERSION)[row][target].items()


@pytest.mark.slow
@every_file
def test_whole_table_compiles(name):
    """A release without results has nothing to compare with, but may have no problem either."""
    if recorded_by_this_triton(name):
        assert kernels_aot.check(name, processes=1) == []
    else:
        op = op_cases.modules()[name].OPS
        for row, entries in kernels_aot.made(name, {}, True, processes=1).items():
            for target, entry in entries.items():
                wrong = "refused" not in entry and compiled_kernels.problems(
                    op[row.partition(":")[0]], target, entry
                )
                assert not wrong, (row, target)


def test_a_changed_kernel_or_tile_is_noticed(monkeypatch):
    from joyedit.kernels import rms_norm

    tile = rms_norm.tile
    monkeypatch.setattr(rms_norm, "tile", lambda *inputs: {**tile(*inputs), "num_warps": 2})
    assert len(kernels_aot.stale("rms_norm", NEWEST)) >= len(kernels_aot.TARGETS)
    monkeypatch.undo()
    monkeypatch.setattr(
        rms_norm.rms_norm_backward, "_src", rms_norm.rms_norm_backward.src.replace("normed * along", "normed")
    )
    assert len(kernels_aot.stale("rms_norm", NEWEST)) >= len(kernels_aot.TARGETS)


def test_a_changed_function_or_constant_of_another_file_is_noticed(monkeypatch, tmp_path):
    (tmp_path / "far.py").write_text(
        "import triton\nimport triton.language as tl\n\nHALF = tl.constexpr(0.5)\n\n\n"
        "@triton.jit\ndef halved(x):\n    return x * HALF\n\n\n"
        "@triton.jit\ndef other(x):\n    return x\n"
    )
    (tmp_path / "near.py").write_text(
        "import far\nimport triton\nfrom far import halved as half\n\n\n"
        "@triton.jit\ndef direct(x):\n    return half(x)\n\n\n"
        "@triton.jit\ndef by_module(x):\n    return far.halved(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "far", importlib.import_module("far"))
    monkeypatch.setitem(sys.modules, "near", importlib.import_module("near"))
    far, near = sys.modules["far"], sys.modules["near"]
    for kernel in (near.direct, near.by_module):
        before = kernels_aot.code(kernel)
        assert len(before) == 3  # the kernel, what it calls, and the constant of that
        with monkeypatch.context() as patch:
            patch.setattr(far.halved, "_src", far.halved.src.replace("*", "+"))
            assert kernels_aot.code(kernel) != before
        with monkeypatch.context() as patch:
            patch.setattr(far, "HALF", triton.language.constexpr(0.25))
            assert kernels_aot.code(kernel) != before
        with monkeypatch.context() as patch:
            patch.setattr(far.other, "_src", far.other.src.replace("x", "y"))
            assert kernels_aot.code(kernel) == before


def test_a_compiler_that_fails_or_aborts_is_a_row(monkeypatch):
    """As an assertion in C++ does, and after it the rest is compiled."""

    def compiled(what, target, recorded):
        if what == "aborts":
            os.write(2, b"/build/Pass.cpp:77: void f(): Assertion `it holds' failed.\n")
            faulthandler.disable()  # it would print every thread's stack
            os.abort()
        if what == "raises":
            raise RuntimeError("PassManager::run failed\nmore")
        return {"registers": 8 * len(what)}

    monkeypatch.setattr(kernels_aot, "compiled", compiled)
    todo = {str(i): (what, "sm_90", {}) for i, what in enumerate(("a", "aborts", "raises", "ab", "abc"))}
    for processes in (1, 2, 9):
        assert dict(kernels_aot.in_children(todo, processes)) == {
            "0": {"registers": 8},
            "1": {"failed": "SIGABRT: Assertion `it holds' failed."},
            "2": {"failed": "RuntimeError: PassManager::run failed"},
            "3": {"registers": 16},
            "4": {"registers": 24},
        }


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """A copy of what is committed of `guide` under the newest release, recorded as of the one installed."""
    monkeypatch.setattr(kernels_aot, "RESULTS", tmp_path)
    folder = tmp_path / kernels_aot.VERSION
    shutil.copytree(ROOT / "benchmarks" / "results" / "kernels" / NEWEST, folder)
    return folder / "guide.json"


def test_check_names_differences_and_writes_nothing(monkeypatch, recorded, capsys):
    results = compiled_kernels.read("guide", kernels_aot.VERSION, recorded.parents[1])
    by_launch = {entry["source"]: entry for row in results.values() for entry in row.values()}

    def compiled(one, target, recorded):
        return {key: value for key, value in by_launch[one.digest].items() if key not in ("source", "launch")}

    files = {name: op_cases.modules()[name] for name in ("guide", "rms_norm")}
    monkeypatch.setattr(op_cases, "modules", lambda: files)
    monkeypatch.setattr(kernels_aot, "compiled", compiled)
    assert kernels_aot.main(["--check", "guide"]) == 0
    changed = recorded.read_text(encoding="utf-8").replace('"registers": 5', '"registers": 6')
    recorded.write_text(changed, encoding="utf-8")
    other = recorded.with_name("rms_norm.json")
    rms_norm = other.read_text(encoding="utf-8").replace('"source": "', '"source": "0', 1)
    other.write_text(rms_norm, encoding="utf-8")
    capsys.readouterr()
    assert kernels_aot.main(["--check", "guide"]) == 1
    said = capsys.readouterr().err
    count = sum(str(entry["registers"]).startswith("5") for row in results.values() for entry in row.values())
    assert said.count(": registers 6") == count > 0 and "out of date: rms_norm: " in said
    assert recorded.read_text(encoding="utf-8") == changed and other.read_text(encoding="utf-8") == rms_norm


def test_only_what_changed_is_compiled_again(monkeypatch, recorded):
    before = compiled_kernels.read("guide", kernels_aot.VERSION, recorded.parents[1])
    (row, entries) = next(iter(before.items()))
    wrong = recorded.read_text(encoding="utf-8").replace(entries["sm_90"]["source"], "of other code")
    recorded.write_text(wrong, encoding="utf-8")
    compiled = {
        key: entries["sm_90"][key]
        for key in ("registers", "spills", "shared", "warps", "instructions", "binary")
    }
    asked = []

    def in_children(todo, processes):
        asked.extend(target for _, target, _ in todo.values())
        return ((key, compiled) for key in todo)

    monkeypatch.setattr(kernels_aot, "in_children", in_children)
    assert kernels_aot.main(["guide"]) == 0
    assert (
        asked == ["sm_90"]
        and compiled_kernels.read("guide", kernels_aot.VERSION, recorded.parents[1]) == before
    )
    kernels_aot.update("guide", again=True)
    launched = {entry["source"] for entries in before.values() for entry in entries.values()}
    assert len(asked) == 1 + len(launched)


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
    good = next(iter(compiled_kernels.read("rms_norm", NEWEST).values()))["sm_90"]

    def problems(**changes):
        return compiled_kernels.problems(module.OPS["rms_norm"], "sm_90", good | changes)

    assert problems() == []
    assert problems(spills=8) == ["8 spills"]
    assert "bytes of shared memory" in problems(shared=232449)[0]
    assert problems(instructions={"all": 9}) == [r"no instruction LDG\.E\.(\w+\.)*128 or LDGSTS"]
    assert problems(failed="SIGABRT") == ["does not compile"]
