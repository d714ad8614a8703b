"""The tables of README.md and docs/, from the committed results: `python -m benchmarks.tables`.

Each stands between `<!-- NAME -->` and `<!-- /NAME -->`, on whichever page has these markers:

  speed:SYSTEM  results/SYSTEM.json, a line per row
  edits         of the same files the whole edit of each system
  kernels       results/kernels/, and the sizes in `op_cases`
  small         results/shapes/: the small models
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"

# The row of results/SYSTEM.json that is a whole edit.
WHOLE_EDITS = {"joyimage": "edit", "diffedit": "whole", "chronoedit": "whole"}
NAMES = {"joyimage": "JoyAI-Image-Edit", "diffedit": "DiffEdit", "chronoedit": "ChronoEdit"}


def render(results: Mapping[str, Any]) -> str:
    """Markdown of one file of results: the machine, and a line per row."""
    m = results["machine"]
    lines = [
        f"Measured {m['date']} on {m['cpu']}, {m['threads']} threads; torch {m['torch']}, "
        f"diffusers {m['diffusers']}, transformers {m['transformers']}.",
        "",
        "| what | shape | reference | joyedit | ratio | expected | largest difference |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"].values():
        below = " (below)" if row["met"] is False else ""
        cells = (
            row["title"] + (f" ({row['remark']})" if row["remark"] else ""),
            row["shape"],
            quantity(row["reference"], row["unit"]),
            quantity(row["ours"], row["unit"]),
            f"{row['ratio']:.2f}x",
            (row["expected"] or "-") + below,
            distance(row["difference"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def edits_table(results: Path = RESULTS) -> str:
    """Markdown of one whole edit per system, on the network sizes that its row names."""
    lines = [
        "| a whole edit on a CPU | reference | joyedit | ratio | largest difference |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for system, name in WHOLE_EDITS.items():
        row = json.loads((results / f"{system}.json").read_text(encoding="utf-8"))["rows"][name]
        cells = (
            f"{NAMES[system]}: {row['shape']}",
            quantity(row["reference"], row["unit"]),
            quantity(row["ours"], row["unit"]),
            f"{row['ratio']:.2f}x",
            distance(row["difference"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quantity(value: float, unit: str) -> str:
    return f"{1000 * value:.3g} ms" if unit == "s" and value < 1 else f"{value:.3g} {unit}"


def distance(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:.0e}" if difference else "0"


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with the table of every pair of markers replaced. Raises FileNotFoundError for unknown
    results."""

    def table(match: re.Match[str]) -> str:
        content = json.loads((results / f"{match[2]}.json").read_text(encoding="utf-8"))
        return f"{match[1]}\n{render(content)}\n{match[3]}"

    text = re.sub(r"(<!-- speed:(\w+) -->).*?(<!-- /speed:\2 -->)", table, text, flags=re.DOTALL)
    for name, made in (("edits", edits_table), ("kernels", kernel_table), ("small", small_table)):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{made(results)}\n{end}{rest.split(end)[1]}"
    return text


def small_table(results: Path = RESULTS) -> str:
    """Markdown of the small models: what they take, and how their edits of held-out scenes come out."""
    lines = [
        "| model | weights | trained on one core | held-out edits that succeed | elsewhere in the picture |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for name in ("joyimage", "chronoedit", "diffedit"):
        recorded = json.loads((results / "shapes" / f"{name}.json").read_text(encoding="utf-8"))
        training = recorded["training"]
        minutes = sum(part["cpu_minutes"] for part in (*training["autoencoder"].values(), training["editor"]))
        held_out = recorded["held_out"]
        said = {"model": "", "reasoning": "with temporal reasoning: "}
        success = "; ".join(
            said[side]
            + ", ".join(f"{kind} {100 * row['ok']:.0f} %" for kind, row in held_out[side]["kinds"].items())
            for side in said
            if side in held_out
        )
        model = held_out["model"]
        if "iou" in model:
            success += f"; mask IoU {model['iou']:.2f} (median)"
            kept = f"{model['masked']:.1f} dB outside the mask"
        else:
            kept = [row["outside"] for row in model["kinds"].values() if row["outside"] is not None]
            kept = f"{min(kept):.1f} to {max(kept):.1f} dB by kind"
        size = f"{recorded['bytes'] / 1e6:.1f} MB"
        lines.append(f"| `tiny-{name}` | {size} | {minutes:.0f} min | {success} | {kept} |")
    return "\n".join(lines)


def kernel_table(results: Path = RESULTS) -> str:
    """Markdown of all kernels: what each fuses, what that saves in a block, and registers of a thread,
    forward and backward, the largest among the calls, on each GPU."""
    from benchmarks import op_cases, roofline

    traffic = roofline.rows()
    lines, targets = [], []
    for file, module in op_cases.modules().items():
        recorded = json.loads((results / "kernels" / f"{file}.json").read_text(encoding="utf-8"))["rows"]
        targets = targets or list(next(iter(recorded.values())))
        for name, op in module.OPS.items():
            mine = [(row, entries) for row, entries in recorded.items() if row.startswith(f"{name}:")]
            saved = roofline.saved_per_block(traffic, name)
            spared = (
                f"{roofline.megabytes(count)} ({roofline.SYSTEMS[system].partition(',')[0]})"
                for system, count in saved.items()
                if count > 1e6
            )
            cells = [f"`{name}`", f"`kernels/{file}.py`", op.fuses, ", ".join(spared) or "-"]
            lines.append(f"| {' | '.join([*cells, *(registers(mine, target) for target in targets)])} |")
    head = ["operation", "file", "in one pass", "memory traffic saved in a block", *targets]
    rule = ["---"] * 4 + ["---:"] * len(targets)
    return "\n".join([f"| {' | '.join(head)} |", f"| {' | '.join(rule)} |", *lines])


def registers(rows: list[tuple[str, Any]], target: str) -> str:
    """forward / backward; "torch" where the operation leaves the GPU to PyTorch."""
    found: dict[bool, list[int]] = {False: [], True: []}
    for row, entries in rows:
        if "registers" in entries.get(target, {}):
            found["[backward" in row].append(entries[target]["registers"])
    if not found[False]:
        return "torch"
    return " / ".join(str(max(values)) for values in found.values() if values)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
