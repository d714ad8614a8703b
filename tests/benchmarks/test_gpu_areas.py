"""What the benchmark on a GPU counts, groups and refuses, and the tables that it writes, without a GPU."""

import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import block, measuring, models, step, systems
from benchmarks.gpu.setting import Setting

ROOT = Path(__file__).resolve().parents[2]
DRY = Setting(torch.device("cpu"), True)


@pytest.fixture(autouse=True)
def without_gradients():
    """As rows are measured."""
    with torch.no_grad():
        yield


def test_operations_are_those_of_the_products_and_of_attention():
    case = block.CASES["joyimage, 9,292 tokens"]
    made = block.made(case, measuring.META, torch.bfloat16)
    n, m, d = 8192, 1100, 4096
    products = 2 * (n + m) * (3 * d * d + d * d + 2 * d * 4 * d)
    attention = 2 * 2 * (n + m) ** 2 * d
    assert measuring.operations(block.without(made)) == products + attention

    made = block.made(block.CASES["chronoedit, 7,200 tokens"], measuring.META, torch.bfloat16)
    n, d, ffn = 7200, 5120, 13824
    products = 2 * n * (4 * d * d + 2 * d * d + 2 * d * ffn)  # k and v of the prompt come with the run
    attention = 2 * 2 * n * (n + 512 + 257) * d
    assert measuring.operations(block.without(made)) == products + attention


def test_a_block_is_measured_forward_and_backward():
    case = block.TINY["chronoedit, tiny"]
    made = block.made(case, DRY.device, torch.float32)
    gradients = block.with_gradients(made)()
    named = ["img", *(name for name, _ in made.module.named_parameters())]
    missing = {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}
    assert all("attn2" in name and ("_k" in name or "_v" in name) for name in missing), missing
    forward, both = (block.measure(DRY, case, "torch", trained) for trained in (False, True))
    assert both["operations"] == 3 * forward["operations"] and forward["seconds"] > 0


def test_random_networks_keep_the_scale_of_what_passes():
    config = systems.TINY["joyimage, tiny"].config
    network = measuring.random_network(systems.JOYIMAGE.network, config, torch.device("cpu"), torch.bfloat16)
    assert network.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert network.proj_out.weight.dtype == torch.bfloat16 and not network.proj_out.weight.requires_grad
    x = torch.randn(64, config.hidden_size, dtype=torch.bfloat16)
    assert 0.5 < network.double_blocks[0].attn.img_attn_qkv(x).float().std() < 2


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", None), ("NVIDIA A10", None)]
)
def test_the_share_of_a_known_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    share = measuring.share_of_peak(10**12, 0.01, torch.device("cuda"))
    assert share == (None if peak is None else pytest.approx(1e14 / peak))


def test_kernels_are_told_apart():
    names = {
        "attention_forward": "attention",
        "gate_residual_norm_forward": "gate_residual_norm",
        "qk_norm_rope_forward": "qk_norm_rope",
        "group_norm_merge_statistics": "group_norm",
        "gated_forward_pieces": "gated",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<cutlass::bfloat16_t>>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128": "attention",
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT": "matrix products",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_relu_f2f_stages_32x5_tn": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1": "matrix products",
        "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": "convolutions",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>": "matrix products",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>": "other",
        "void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float>": "other",
        "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>": "copies",
        "Memcpy DtoD (Device -> Device)": "copies",
    }
    assert {name: step.group(name) for name in names} == names


def test_shares_of_a_profile():
    kernels = [
        step.Kernel("nvjet_a", 100, 140),
        step.Kernel("attention_forward", 140, 170),
        step.Kernel("elementwise", 165, 175),  # on another stream, at the same time
        step.Kernel("nvjet_a", 190, 200),
    ]
    found = step.summary(kernels[::-1])
    assert found["seconds"] == pytest.approx(100e-6) and found["launches"] == 4
    shares = {"matrix products": 0.5, "attention": 0.3, "other": 0.1, "idle": 0.15}
    assert found["shares"] == pytest.approx(shares)
    assert found["longest"][0] == {
        "name": "nvjet_a",
        "group": "matrix products",
        "seconds": pytest.approx(50e-6),
        "launches": 2,
    }


@pytest.mark.parametrize("name", systems.TINY)
def test_a_step_is_the_same_with_and_without_a_graph(name):
    system = systems.TINY[name]
    calls = step.GraphedCalls(step.Again)
    results = []
    for call in (systems.directly, calls):
        torch.manual_seed(0)
        whole = system.ours(system, DRY.device, call).whole
        results.append([whole() for _ in range(5)])
    assert len(calls) == 1
    for plain, graphed in zip(*results, strict=True):
        assert torch.equal(plain, graphed)
    assert not torch.equal(results[0][0], results[0][1])


@pytest.mark.parametrize("name", systems.TINY)
def test_a_network_is_told_each_step_of_its_own(name):
    predict = systems.TINY[name].ours(systems.TINY[name], DRY.device).predict
    first, again, last = (torch.cat(list(predict(i))) for i in (0, 0, systems.STEPS - 1))
    assert torch.equal(first, again) and not torch.equal(first, last)


def test_a_step_of_another_run_begins_anew(monkeypatch):
    monkeypatch.setattr(systems, "STEPS", 2)
    system = systems.TINY["joyimage, tiny"]
    whole = system.ours(system, DRY.device).whole
    first, second, again = (whole() for _ in range(3))
    assert torch.equal(first, again) and not torch.equal(first, second)


def rows_of(setting, kind):
    return {name: measure for name, measure in step.rows(setting) if name.endswith(f": {kind}")}


def test_steps_are_profiled():
    (measure,) = (m for name, m in rows_of(DRY, "profile").items() if name.startswith("chronoedit"))
    found = measure()
    products = next(one for one in found["longest"] if one["name"] in ("aten::mm", "aten::addmm"))
    assert found["launches"] > products["launches"] > 10
    json.dumps(found, allow_nan=False)


def test_without_diffusers_the_row_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for measure in rows_of(DRY, "diffusers").values():
        assert measure() == {"seconds": None, "why": "diffusers is not installed"}
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(__version__="0.30.0"))
    found = rows_of(DRY, "diffusers")["joyimage, tiny: diffusers"]()
    assert found["why"] == "diffusers 0.30.0 has no JoyImageEditTransformer3DModel"


def test_what_does_not_fit_is_not_begun(monkeypatch):
    monkeypatch.setattr(Setting, "free", lambda self: 20 * 10**9)
    monkeypatch.setattr(systems, "random_network", None)
    found = step.or_why(step.with_room, step.eager, Setting(DRY.device, False), systems.JOYIMAGE)
    assert found["seconds"] is None
    assert found["why"] == "needs 36.6 GB of memory, 20.0 GB are free"


def test_a_result_that_is_not_finite_is_a_failure():
    system = systems.TINY["joyimage, tiny"]
    with pytest.raises(RuntimeError, match="finite"):
        step.figures(DRY, system, lambda: torch.tensor([1.0, math.nan]))


def test_no_step_but_the_first_may_wait(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    pipe = types.SimpleNamespace(num_timesteps=4)
    with pytest.raises(KeyError), models.Callback(torch.device("cuda")) as callback:
        for i in range(4):
            callback(pipe, i, torch.tensor(0), {"latents": torch.zeros(1)})
        assert modes == ["error", "error", "error", "default"]
        callback(pipe, 0, torch.tensor(0), {"latents": torch.zeros(1)})
        raise KeyError
    assert modes[4:] == ["error", "default"]


@pytest.mark.parametrize(
    "system", ["diffedit", *(pytest.param(s, marks=pytest.mark.slow) for s in ("joyimage", "chronoedit"))]
)
def test_small_models_edit_the_same_twice(system):
    found = models.measure(DRY, system, torch.float32, models.SAME[system])
    assert found["pixels"] == found["latents"] == {"largest": 0.0, "rms": 0.0}


def test_other_edits_are_a_failure(monkeypatch):
    """The edit on the device comes first."""
    pixels, mask = torch.rand(1, 3, 8, 8).double(), torch.zeros(1, 10, 10).double()
    flipped = mask.clone()
    flipped[:, :, 0] = 1

    def measure(allowed, *results):
        results = iter(results)
        monkeypatch.setattr(models, "edited", lambda *args: next(results))
        return models.measure(DRY, "diffedit", torch.float32, allowed)

    exact, off = {"pixels": pixels, "mask": mask}, {"pixels": pixels + 0.01, "mask": mask}
    assert measure(0.011, off, exact)["pixels"]["rms"] == pytest.approx(0.01)
    for allowed, wrong, said in (
        (0.009, off, "pixels"),
        (1.0, {"pixels": pixels * math.nan, "mask": mask}, "pixels"),
        (1.0, {"pixels": pixels, "mask": flipped}, "masks"),
    ):
        with pytest.raises(models.Different, match=said):
            measure(allowed, wrong, exact)


@pytest.fixture
def tiles():
    pytest.importorskip("triton")
    from benchmarks.gpu import tiles

    return tiles


@pytest.fixture
def tables(tiles, tmp_path):
    """A function: the tables of a file, imported from a copy. And its path."""
    copy = tmp_path / "attention_tiles_copy.py"
    copy.write_bytes(tiles.FILE.read_bytes() + b"EMPTY: dict[str, dict[int, Tile]] = {}\n")

    def tables():
        spec = importlib.util.spec_from_file_location(copy.stem, copy)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return copy, tables


def swept(table, family, width, tile, seconds=0.00236):
    return {
        "area": "tiles",
        "name": "",
        "failed": None,
        "table": table,
        "family": family,
        "width": width,
        "call": "JoyImage, image and text",
        "best": dict(
            zip(("BLOCK_N", "BLOCK_M", "num_warps", "num_stages", "WARP_SPECIALIZE"), tile, strict=True)
        ),
        "seconds": seconds,
        "triton": "3.6.0",
        "device": "NVIDIA H200",
    }


def test_the_tables_are_written_from_a_sweep(tiles, tables, tmp_path):
    path, imported = tables
    before, old = path.read_text(encoding="utf-8").splitlines(), imported()
    sweeps = [
        swept("TILES", "sm_90", 128, (64, 32, 4, 5, False)),
        swept("TILES", "sm_90", 72, (32, 128, 8, 1, False)),  # of a width that has no row
        swept("TWO_KEY_SEGMENTS_TILES", "gfx950", 128, (16, 16, 4, 1, True)),  # of a family that is not there
        swept("EMPTY", "sm_90", 128, (32, 32, 8, 2, False)),
        swept("EMPTY", "sm_90", 64, (32, 32, 4, 2, False)),
        swept("TILES", "sm_90", 128, (64, 64, 4, 2, False)),  # the first of a row counts
    ]
    failed = {"area": "tiles", "name": "", "failed": "RuntimeError", "seconds": None}
    others = {**sweeps[0], "area": "calls", "width": 256}
    results = tmp_path / "gpu.json"
    results.write_text(json.dumps({"dry_run": False, "machine": {}, "rows": [*sweeps, failed, others]}))
    assert tiles.main([str(results), "--file", str(path)]) == 0

    text, new = path.read_text(encoding="utf-8"), imported()
    said = "2.36 ms on NVIDIA H200, Triton 3.6.0"
    assert text.count(said) == len(sweeps) - 1
    assert f"        128: Tile(64, 32, 4, 5),  # {said}\n" in text
    assert tuple(new.TILES["sm_90"][128]) == (64, 32, 4, 5, False)
    assert tuple(new.TILES["sm_90"][72]) == (32, 128, 8, 1, False)
    assert tuple(new.TWO_KEY_SEGMENTS_TILES["gfx950"][128]) == (16, 16, 4, 1, True)
    assert list(new.TILES["sm_90"]) == sorted(new.TILES["sm_90"])  # the first that is wide enough is taken
    empty = {64: (32, 32, 4, 2, False), 128: (32, 32, 8, 2, False)}
    assert {device: {w: tuple(tile) for w, tile in r.items()} for device, r in new.EMPTY.items()} == {
        "sm_90": empty
    }
    kept = [line for line in text[: text.index("EMPTY")].splitlines() if said not in line]
    gone = [line for line in before[:-1] if line not in kept]
    assert len(gone) == 1 and gone[0].strip().startswith("128: Tile(")
    family = ['    "gfx950": {', "    },"]
    assert sorted(kept + gone) == sorted(before[:-1] + family)
    for name in ("TILES", "CAUSAL_OR_SUMMED_TILES", "TWO_KEY_SEGMENTS_TILES", "FP32_TILES"):
        for device, rows in getattr(old, name).items():
            for width, tile in rows.items():
                if (name, device, width) != ("TILES", "sm_90", 128):
                    assert getattr(new, name)[device][width] == tile

    tiles.main([str(results), "--file", str(path)])
    assert path.read_text(encoding="utf-8") == text, "the same sweep again changes nothing"


def test_only_what_was_measured_is_written(tiles, tables, tmp_path, capsys):
    path, _ = tables
    before, results = path.read_bytes(), tmp_path / "gpu.json"
    rows = [swept("TILES", "sm_90", 128, (64, 32, 4, 5, False))]
    for content, said in (
        ({"dry_run": True, "machine": {}, "rows": rows}, "dry run"),
        ({"dry_run": False, "machine": {}, "rows": []}, "no sweep"),
    ):
        results.write_text(json.dumps(content))
        with pytest.raises(SystemExit):
            tiles.main([str(results), "--file", str(path)])
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="no table OTHER"):
        tiles.rewritten(path.read_text(), [swept("OTHER", "sm_90", 128, (64, 32, 4, 5, False))])
    assert path.read_bytes() == before


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_kernel_takes_what_the_sweep_tries_and_writes(tiles, monkeypatch, family, is_old):
    from joyedit.kernels import attention as kernels
    from joyedit.kernels import attention_tiles

    def chosen(entry):
        x = entry.args[0]
        dtype, *asked = entry.asked()
        constants, options = kernels.choose(
            family, (x[0] if type(x) is tuple else x).shape[-1], dtype, *asked
        )
        values = {**constants, **options}
        return tiles.Tile(**{name: values[name] for name in tiles.Tile._fields})

    monkeypatch.setattr(kernels, "family", lambda device: family)
    monkeypatch.setattr(kernels.triton, "__version__", "3.5.1" if is_old else "3.9.0")
    setting = Setting(torch.device("cpu"), False)
    for entry in tiles.ENTRIES:
        if is_old:  # rows that lie over those of newer versions
            for table in (
                attention_tiles.TILES_BEFORE_3_6,
                attention_tiles.CAUSAL_OR_SUMMED_TILES_BEFORE_3_6,
            ):
                monkeypatch.setitem(table, family, {entry.width: tiles.Tile(64, 64, 4, 2)})
        used, *others = tiles.candidates(setting, entry)
        assert chosen(entry) == used and len({used, *others}) == 1 + len(others) > 5
        for tile in others:
            with tiles.using(tile):
                assert chosen(entry) == tile
        table = getattr(attention_tiles, entry.table_here())
        with monkeypatch.context() as patch:
            patch.setitem(table, family, {**table.get(family, {}), entry.width: others[0]})
            assert chosen(entry) == others[0], entry
        assert chosen(entry) == used


def test_a_candidate_says_why_it_is_not_timed(tiles, monkeypatch):
    wanted = torch.linspace(-1, 1, 8)
    launched = []

    def run(*args):
        return tiles.JITFunction.run(None, *args)

    monkeypatch.setattr(tiles.JITFunction, "run", lambda self, result, spills: kernel(result, spills))

    def kernel(result, spills):
        launched.append(result)
        return types.SimpleNamespace(n_spills=spills, result=result)

    monkeypatch.setattr(tiles.ops, "attention", lambda result, spills: run(result, spills).result)
    assert tiles.tried(DRY, (wanted, 0), wanted)["seconds"] > 0
    assert len(launched) > 1  # once to be looked at, then to be timed
    assert tiles.tried(DRY, (wanted, 14), wanted) == {"seconds": None, "why": "14 registers are spilled"}
    assert "off by" in tiles.tried(DRY, (wanted + 1e-3, 0), wanted)["why"]
    assert "off by" in tiles.tried(DRY, (wanted * math.nan, 0), wanted)["why"]

    def fails(*args):
        raise MemoryError("out of resource: shared memory, Required: 262152, Hardware limit: 232448")

    monkeypatch.setattr(tiles.ops, "attention", fails)
    assert "Hardware limit" in tiles.tried(DRY, (wanted, 0), wanted)["why"]
