"""What the compilers are given of attention: between two segments, no pointer is chosen in a way that one of
them cannot take."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from triton._C.libtriton import ir, passes
from triton.compiler import make_backend

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
kernels_aot = importlib.import_module("benchmarks.kernels_aot")
cases = importlib.import_module("benchmarks.op_cases.attention")
sys.path.remove(str(ROOT))


def intermediate(launch, target) -> str:
    """The code of a launch as it is before anything is done for its GPU, with constants folded."""
    backend, context = make_backend(target), ir.context()
    options = backend.parse_options(launch.options)
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = backend.get_codegen_implementation(options), backend.get_module_map()
    module, stages = launch.source.make_ir(target, options, *made, context), {}
    backend.add_stages(stages, options, launch.source.language)
    module, folding = stages["ttir"](module, {}), ir.pass_manager(context)
    passes.common.add_canonicalizer(folding)
    folding.run(module, "folding")
    return str(module)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_no_branch_yields_a_pointer_and_none_is_selected_on_amd(target):
    """Triton 3.6 copies nothing ahead through a pointer that comes out of a branch, and does not compile a
    selected one for AMD's devices."""
    (case,) = (case for case in cases.CASES if case.what == "image and text")
    with kernels_aot.launches_on(target) as launches:
        kernels_aot.call(case)
    code = intermediate(launches[0], kernels_aot.TARGETS[target])
    assert not re.search(r"scf\.if .*-> .*!tt\.ptr", code)
    selected = len(re.findall(r"arith\.select .*: !tt\.ptr", code))
    assert selected == (0 if target == "gfx942" else 2), "k and v"
