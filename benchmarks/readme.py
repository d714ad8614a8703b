"""The speed tables of README.md, from the committed results: `python -m benchmarks.readme`.

A table of `results/NAME.json` stands between `<!-- speed:NAME -->` and `<!-- /speed:NAME -->`.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


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
            "-" if row["difference"] is None else f"{row['difference']:.0e}" if row["difference"] else "0",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quantity(value: float, unit: str) -> str:
    return f"{1000 * value:.3g} ms" if unit == "s" and value < 1 else f"{value:.3g} {unit}"


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with the table of every pair of markers replaced. Raises FileNotFoundError for unknown
    results."""

    def table(match: re.Match[str]) -> str:
        content = json.loads((results / f"{match[2]}.json").read_text(encoding="utf-8"))
        return f"{match[1]}\n{render(content)}\n{match[3]}"

    return re.sub(r"(<!-- speed:(\w+) -->).*?(<!-- /speed:\2 -->)", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=ROOT / "README.md")
    path = parser.parse_args().file
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
