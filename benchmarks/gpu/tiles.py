"""Which tiles of the attention are fastest on this GPU, and the tables of them that the kernels are built by.

    python -m benchmarks.gpu --only tiles --out gpu.json    measures
    python -m benchmarks.gpu.tiles gpu.json                 writes the best into kernels/attention_tiles.py

For each row of the tables that a call of the three systems needs: the tile in use, and its neighbours, one
step away in one property or in two that are each other's price. A candidate that does not build, spills
registers or computes something else is not timed, and says why. FP32_TILES are left alone: where PyTorch has
a kernel, "auto" takes that.

A tile needs seconds to be compiled. Processes beside this one compile all of them first, into the cache that
Triton keeps on the disk.
"""

import argparse
import ast
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.gpu.setting import Row, Setting
from benchmarks.op_cases import made
from benchmarks.op_cases.attention import HALF, all_of, alone, projected
from joyedit import ops
from joyedit.kernels import attention as kernels
from joyedit.kernels.attention_tiles import Tile

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "kernels" / "attention_tiles.py"
COMPILERS = 12  # processes
PATIENCE = 60  # seconds that these are waited for
BUDGET = 0.06  # seconds that each candidate is timed


class Entry(NamedTuple):
    """A row of a table, the width of the heads as padded, and a call of `ops.attention` that needs it. Where
    several share a row, the first has it."""

    table: str
    width: int
    call: str
    args: tuple[Any, ...]

    def asked(self) -> tuple[torch.dtype, bool, bool, tuple[int, int]]:
        """What the kernel chooses its tile by, beside device and width."""
        q, k, _, causal, summed = (*self.args, False, False)[:5]
        q, k = (x if type(x) is tuple else (x,) for x in (q, k))
        return q[0].dtype, causal, summed, (len(q), len(k))

    def table_here(self) -> str:
        """The table whose rows lie over all others of the call: older Triton has some of its own."""
        _, causal, summed, _ = self.asked()
        older = "CAUSAL_OR_SUMMED_TILES_BEFORE_3_6" if causal or summed else "TILES_BEFORE_3_6"
        return older if kernels.before_3_6() else self.table


IMAGE_AND_TEXT = (alone(8192, 32, 128), alone(1100, 32, 128))
TWO_IMAGES = (*all_of(8192, 16, 72)[:2], projected(8192, 16, 72), False, False, [4096, 4096])
PREFIX = alone(1098, 8, 128)
CONTEXT = (alone(512, 40, 128), alone(257, 40, 128))
ENTRIES = (
    Entry("TILES", 128, "JoyImage, image and text", (IMAGE_AND_TEXT,) * 3),
    Entry("TILES", 64, "Stable Diffusion 2.1, 768 px", all_of(9216, 5, 64, HALF, 2)),
    Entry(
        "SUMMED_TILES",
        128,
        "ChronoEdit, to text and to image",
        (alone(7200, 40, 128), CONTEXT, CONTEXT, False, True),
    ),
    Entry(
        "TWO_KEY_SEGMENTS_TILES",
        128,
        "JoyImage, target to image and text",
        (alone(4096, 32, 128), IMAGE_AND_TEXT, IMAGE_AND_TEXT),
    ),
    Entry("TILES", 48, "Stable Diffusion 1.5, 512 px", all_of(4096, 8, 40, HALF, 2)),
    Entry("TILES", 80, "JoyImage, two pictures in the vision tower", TWO_IMAGES),
    Entry("TILES", 160, "Stable Diffusion 1.5, 16 x 16", all_of(256, 8, 160, HALF, 2)),
    Entry("CAUSAL_OR_SUMMED_TILES", 128, "JoyImage, prompt", (alone(1098, 32, 128), PREFIX, PREFIX, True)),
    Entry("CAUSAL_OR_SUMMED_TILES", 64, "CLIP, prompt", (*all_of(77, 16, 64, HALF, 2), True)),
)
TINY = (
    Entry("TILES", 16, "tiny", all_of(40, 1, 16, torch.float16)),
    Entry("CAUSAL_OR_SUMMED_TILES", 16, "tiny, causal", (*all_of(20, 1, 16, torch.float16), True)),
)


def rows(setting: Setting) -> Iterator[Row]:
    yield "compiled beside", partial(compile_beside, setting)
    for entry in entries(setting):
        yield f"{entry.table}, {entry.width}: {entry.call}", partial(sweep, setting, entry)


def entries(setting: Setting) -> tuple[Entry, ...]:
    return TINY if setting.dry else ENTRIES


def candidates(setting: Setting, entry: Entry) -> list[Tile]:
    """The tile in use first. Raises RuntimeError for a device without any."""
    device = kernels.family(setting.device)
    if device is None:
        raise RuntimeError(kernels.no_tiles(setting.device))
    rows = kernels.tiles_for(device, *entry.asked())
    used = rows[min(widest for widest in rows if entry.width <= widest)]
    found = neighbours(used, can_specialize=device == "sm_100")
    return found[:2] if setting.dry else found


def neighbours(tile: Tile, can_specialize: bool) -> list[Tile]:
    """A tile and those around it. can_specialize: elsewhere than on sm_100, Triton makes the same code with
    and without WARP_SPECIALIZE."""
    n, m, warps, stages, specialize = tile
    found = [
        tile,
        tile._replace(num_stages=stages + 1),
        tile._replace(num_stages=stages - 1),
        tile._replace(num_warps=12 - warps),  # 4 and 8
        tile._replace(BLOCK_M=m // 2),
        tile._replace(BLOCK_M=m // 2, num_stages=stages + 1),
        tile._replace(BLOCK_M=2 * m),
        tile._replace(BLOCK_N=n // 2, num_warps=4),
        tile._replace(BLOCK_N=n // 2, BLOCK_M=2 * m),
        tile._replace(BLOCK_N=2 * n, num_warps=8),
    ]
    if can_specialize:
        found.append(tile._replace(WARP_SPECIALIZE=not specialize))
    sound = (t for t in found if 16 <= t.BLOCK_M <= 128 and 16 <= t.BLOCK_N <= 256 and t.num_stages)
    return list(dict.fromkeys(sound))


def sweep(setting: Setting, entry: Entry) -> dict[str, Any]:
    """The candidates of an entry, and the best of them. Raises RuntimeError when none can be used."""
    device = kernels.family(setting.device)
    args = made(entry.args, setting.device)
    with ops.backend("torch"):
        wanted = ops.attention(*args)
    found = []
    for tile in candidates(setting, entry):
        with using(tile), ops.backend("triton"):
            found.append({"tile": tile._asdict(), **tried(setting, args, wanted)})
    timed = [one for one in found if one["seconds"] is not None]
    if not timed:
        raise RuntimeError(f"no tile can be used: {found[0]['why']}")
    best = min(timed, key=lambda one: one["seconds"])
    return {
        "table": entry.table_here(),
        "family": device,
        "width": entry.width,
        "call": entry.call,
        "best": best["tile"],
        "seconds": best["seconds"],
        "triton": triton.__version__,
        "device": torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "none",
        "candidates": found,
    }


def using(tile: Tile) -> contextlib.AbstractContextManager[Any]:
    """Every call is made with this tile."""
    return mock.patch.object(kernels, "tiles_for", lambda *asked: {ops.HEAD_WIDTH: tile})


def tried(setting: Setting, args: tuple[Any, ...], wanted: Tensor) -> dict[str, Any]:
    """Seconds of a call with the tile in use; or None, and why."""
    try:
        with compiled() as launched:
            out = ops.attention(*args)
            setting.finish()
    except Exception as error:
        setting.finish()  # a device that is broken now is a failure of the row
        return {"seconds": None, "why": f"{type(error).__name__}: {error}"[:300]}
    if spills := sum(kernel.n_spills or 0 for kernel in launched):
        return {"seconds": None, "why": f"{spills} registers are spilled"}
    # Two ways to round the same sums, each within a few units of the dtype at the scale of the result.
    error, scale = (out - wanted).abs().max().item(), wanted.abs().max().item()
    if not error <= 4 * torch.finfo(out.dtype).eps * scale:
        return {"seconds": None, "why": f"the result is off by {error:.1e}"}
    return {"seconds": setting.kernel_seconds(lambda: ops.attention(*args), BUDGET), "why": None}


@contextlib.contextmanager
def compiled() -> Iterator[list[Any]]:
    """The compiled kernels that are launched in it. Of the interpreter's there are none."""
    kernels, run = [], JITFunction.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs)
        if kernel is not None:
            kernels.append(kernel)
        return kernel

    with mock.patch.object(JITFunction, "run", recorded):
        yield kernels


def compile_beside(setting: Setting) -> dict[str, Any]:
    """Let other processes launch every candidate once. What they leave is compiled when it is timed."""
    count = 1 if setting.dry else max(1, min(COMPILERS, (os.cpu_count() or 1) - 1))
    begin = time.monotonic()
    processes = []
    try:
        for share in range(count):
            command = [sys.executable, "-m", "benchmarks.gpu.tiles", "--compile", str(share), str(count)]
            command += ["--dry-run"] if setting.dry else []
            processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL))
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, begin + PATIENCE - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    if not any(code == 0 for code in codes):
        raise RuntimeError(f"no process came to its end: exit codes {codes}")
    return {"seconds": time.monotonic() - begin, "exit_codes": codes}


def compile_share(setting: Setting, share: int, count: int) -> None:
    """Launch every count-th candidate. Errors are found again, and said, by who times them."""
    jobs = [(entry, tile) for entry in entries(setting) for tile in candidates(setting, entry)]
    for entry, tile in jobs[share::count]:
        args = made(entry.args, setting.device)
        with using(tile), ops.backend("triton"), contextlib.suppress(Exception):
            ops.attention(*args)


def rewritten(text: str, sweeps: Sequence[Mapping[str, Any]]) -> str:
    """The file of the tables with the best tile of each sweep; all other lines are as they were.

    A row of the swept width is replaced, or put in its place by width; where the table has nothing for the
    family of the GPU, that is added. Of two sweeps of a row the first counts. Raises ValueError for a table
    that is not in the file.
    """
    for found in reversed(sweeps):
        tile = Tile(**found["best"])
        said = f"{1000 * found['seconds']:.3g} ms on {found['device']}, Triton {found['triton']}"
        row = f"{found['width']}: {written(tile)},  # {said}"
        text = with_row(text, found["table"], found["family"], found["width"], row)
    return text


def written(tile: Tile) -> str:
    plain = ", ".join(map(str, tile[:4]))
    return f"Tile({plain}, WARP_SPECIALIZE=True)" if tile.WARP_SPECIALIZE else f"Tile({plain})"


def with_row(text: str, table: str, family: str, width: int, row: str) -> str:
    lines, rows = text.splitlines(keepends=True), table_of(text, table)
    families = {key.value: value for key, value in zip(rows.keys, rows.values, strict=True)}
    new = [f"        {row}\n"]
    if family in families:
        places = lines_of(families[family])
        after = (first for known, (first, _) in places.items() if known > width)
        first = min(after, default=families[family].end_lineno - 1)
        begin, end = places.get(width, (first, first))
    else:
        new = [f'    "{family}": {{\n', *new, "    },\n"]
        begin = end = rows.end_lineno - 1
        if not families:  # {}, all in one line
            new = [lines[begin][: rows.col_offset] + "{\n", *new, "}\n"]
            end += 1
    lines[begin:end] = new
    return "".join(lines)


def table_of(text: str, name: str) -> ast.Dict:
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if [getattr(target, "id", None) for target in targets] == [name]:
            return node.value
    raise ValueError(f"the file has no table {name}")


def lines_of(rows: ast.Dict) -> dict[int, tuple[int, int]]:
    """Width -> where its line begins and ends."""
    pairs = zip(rows.keys, rows.values, strict=True)
    return {key.value: (key.lineno - 1, value.end_lineno) for key, value in pairs}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.tiles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="?", type=Path, help="what `python -m benchmarks.gpu` wrote")
    parser.add_argument("--file", type=Path, default=FILE, help="the tables (default: %(default)s)")
    parser.add_argument("--compile", nargs=2, type=int, metavar=("SHARE", "COUNT"), help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.compile:
        compile_share(
            Setting(torch.device("cpu" if given.dry_run else "cuda"), given.dry_run), *given.compile
        )
        return 0
    if given.results is None:
        parser.error("which results?")
    results = json.loads(given.results.read_text(encoding="utf-8"))
    if results["dry_run"]:
        parser.error(f"{given.results} is of a dry run: nothing was measured")
    sweeps = [row for row in results["rows"] if row["area"] == "tiles" and "table" in row]
    if not sweeps:
        parser.error(f"{given.results} holds no sweep of tiles")
    text = given.file.read_text(encoding="utf-8")
    given.file.write_text(rewritten(text, sweeps), encoding="utf-8")
    for row in sweeps:
        print(f"{row['table']}, {row['family']}, {row['width']}: {written(Tile(**row['best']))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
