"""The tables of README.md and docs/, from the committed results: `python -m benchmarks.tables`.

Each stands between `<!-- NAME -->` and `<!-- /NAME -->`, on whichever page has these markers:

  speed:SYSTEM  results/SYSTEM.json, a line per row
  edits         of the same files the whole edit of each system
  gpus          results/kernels/ and results/gpu/: what each family of GPUs was compiled for, and measured
  kernels       the newest Triton's results/kernels/, and the sizes in `op_cases`
  problems      results/kernels/: what spills or does not compile, under each Triton
  measured      results/gpu/: blocks and steps on GPUs
  small         results/shapes/: the small models
  learned       results/new_instruction.json: what an adapter of tiny-joyimage learned, in a sentence
  kept          the same by kind, in a table
  machines      results/estimates/: with which flags the released models fit into which memory
  released_machines  the same with sizes, and how long an edit takes
  estimates     results/estimates/: peaks that were estimated and measured
  together      joyedit/pipelines/together.py: which settings go with which
  full_size     results/full_size.json: edits by networks of the released sizes within a budget
  streaming     the same file: a step with blocks that come against one with blocks that stay, in a sentence
  drift         results/drift/: what the small models do to the rest of the picture, in a sentence
  drifts        the same by model, in a table
  quantised     results/quantised/: what eight bits cost the small models
  released      the same file: bytes of the released networks
  training      results/training.json: a step of training beside diffusers and PEFT
  scaling       results/scaling.json: a step on several GPUs, as predicted
  steps         results/step_cache/: what a step cache leaves out, and what that costs the small models
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import compiled_kernels, op_cases, roofline
from joyedit.estimates.estimating import RESERVED
from joyedit.pipelines import together

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"

# The row of results/SYSTEM.json that is a whole edit.
WHOLE_EDITS = {"joyimage": "edit", "diffedit": "whole", "chronoedit": "whole"}
# What a GPU's kernels are compiled for -> its names, and those of them that `roofline` has figures of.
FAMILIES = {
    "sm_80": ("A100", ()),
    "sm_86": ("RTX 30", ()),
    "sm_89": ("RTX 40, L4", ("4090",)),
    "sm_90": ("H100, H200", ("H100", "H200")),
    "sm_100": ("B200", ("B200",)),
    "sm_120": ("RTX 50", ()),
    "gfx942": ("MI300X", ("MI300X",)),
    "gfx950": ("MI350X", ()),
}
STEP = "joyimage, 1024 px: eager"  # the row of results/gpu/ that the README shows
FULL_SIZE = {
    "joyimage": "JoyAI-Image-Edit in bf16",
    "joyimage-int8": "JoyAI-Image-Edit, transformer in int8",
    "chronoedit": "ChronoEdit in bf16",
}
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
    for name, made in TABLES.items():
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
        parts = [*training["autoencoder"].values(), training["editor"], training.get("more")]
        minutes = sum(part["cpu_minutes"] for part in parts if part)
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
        if "wordings" in held_out:
            plain, *others = (100 * said["ok"] for said in held_out["wordings"].values())
            success += f". Of some of them {plain:.0f} % in the plain wording, "
            success += f"at least {min(others):.0f} % in others"
        size = f"{recorded['bytes'] / 1e6:.1f} MB"
        lines.append(f"| `tiny-{name}` | {size} | {minutes:.0f} min | {success} | {kept} |")
    return "\n".join(lines)


def learned_sentence(results: Path = RESULTS) -> str:
    """What the worked example of a training came to."""
    report, kinds = learned(results)
    new = kinds.pop(report["kind"])
    worst, (before, after) = min(kinds.items(), key=lambda row: row[1][1] - row[1][0])
    mean = [100 * sum(side) / len(kinds) for side in zip(*kinds.values(), strict=True)]
    lost = f"most at {worst}, {percent(before)} to {percent(after)}" if after < before else "none less often"
    minutes = report["processor_seconds"] / 60
    return (
        f"Of held-out scenes the edit succeeds in {percent(new[0])} before and {percent(new[1])} after it; "
        f"the {len(kinds)} kinds that it knew in {mean[0]:.1f} % and {mean[1]:.1f} % ({lost}). "
        f"Training takes {minutes:.1f} minutes of one core."
    )


def kept_table(results: Path = RESULTS) -> str:
    """Markdown of the same by kind of edit."""
    report, kinds = learned(results)
    count = report["after"]["kinds"][report["kind"]]["edits"]
    lines = [f"| {count} held-out edits of each kind | before | after |", "| --- | ---: | ---: |"]
    lines += [f"| {kind} | {percent(a)} | {percent(b)} |" for kind, (a, b) in kinds.items()]
    return "\n".join(lines)


def learned(results: Path) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """The report, and the shares of edits that succeed before and after, by kind."""
    report = json.loads((results / "new_instruction.json").read_text(encoding="utf-8"))
    before, after = (report[side]["kinds"] for side in ("before", "after"))
    return report, {kind: (before[kind]["ok"], row["ok"]) for kind, row in after.items()}


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def drift_sentence(results: Path = RESULTS) -> str:
    """Markdown of how far each small model shifts, scales and colours what it shall keep."""
    said = []
    for name, found in drifts(results).items():
        shift, scale, colour = (found[what]["median"] for what in ("shift", "scale", "delta_e"))
        said.append(f"`{name}` {shift:.2f} pixels, {100 * scale:.1f} % in scale, {colour:.1f} in CIE Lab")
    return (
        "Between photograph and result, outside the edit (median of held-out drawn scenes): "
        f"{'; '.join(said)}. `python -m benchmarks.drift FOLDER` says it of your own pairs."
    )


def drift_table(results: Path = RESULTS) -> str:
    """Markdown of `drifts`: medians, 95th percentiles, and means with their signs."""
    lines = [
        "| model | edits | shift, pixels | scale | colour, CIE Lab | mean: down, right; scale; R, G, B |",
        "| --- | ---: | --- | --- | --- | --- |",
    ]
    for name, found in drifts(results).items():
        shift, scale, colour, levels = (found[what] for what in ("shift", "scale", "delta_e", "colour"))
        down, right = shift["mean"]
        cells = (
            f"`{name}`",
            str(found["pairs"]),
            f"{shift['median']:.2f}, 95 % below {shift['95 %']:.2f}",
            f"{100 * scale['median']:.2f} %, 95 % below {100 * scale['95 %']:.1f} %",
            f"{colour['median']:.1f}, 95 % below {colour['95 %']:.1f}",
            f"{down:+.2f}, {right:+.2f}; {100 * scale['mean']:+.2f} %; "
            + ", ".join(f"{level:+.1f}" for level in levels["mean"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def drifts(results: Path) -> dict[str, dict[str, Any]]:
    """Model -> the summary of its edits."""
    files = (results / "drift" / f"tiny-{name}.json" for name in ("joyimage", "chronoedit", "diffedit"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))["summary"] for path in files}


def kernel_table(results: Path = RESULTS) -> str:
    """Markdown of all kernels under the newest Triton: what each fuses, what that saves in a block, and
    registers of a thread, forward and backward, the largest among the calls, on each GPU."""
    traffic, (*_, newest) = roofline.rows(), compiled_kernels.versions(results / "kernels")
    lines, targets = [], []
    for file, module in op_cases.modules().items():
        recorded = compiled_kernels.read(file, newest, results / "kernels")
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
    head = [f"operation, Triton {newest}", "file", "in one pass", "memory traffic saved in a block", *targets]
    rule = ["---"] * 4 + ["---:"] * len(targets)
    return "\n".join([f"| {' | '.join(head)} |", f"| {' | '.join(rule)} |", *lines])


def registers(rows: list[tuple[str, Any]], target: str) -> str:
    """forward / backward; "torch" where the operation leaves the GPU to PyTorch."""
    found: dict[bool, list[int]] = {False: [], True: []}
    for row, entries in rows:
        if "registers" in entries.get(target, {}):
            found["backward" in row.rpartition("[")[2]].append(entries[target]["registers"])
    if not found[False]:
        return "torch"
    return " / ".join(str(max(values)) for values in found.values() if values)


def problem_table(results: Path = RESULTS) -> str:
    """Markdown of what is wrong with a kernel on a GPU under a release of Triton."""
    versions = compiled_kernels.versions(results / "kernels")
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for version in versions:
        for file in op_cases.modules():
            for row, target, what in compiled_kernels.all_problems(file, version, results / "kernels"):
                found.setdefault((row, target), {}).setdefault(version, []).append(what)
    if not found:
        return f"Nothing under Triton {', '.join(versions)}."
    head = ["kernel", "GPU", *(f"Triton {version}" for version in versions)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for (row, target), said in found.items():
        cells = (", ".join(said.get(version, "-")) for version in versions)
        lines.append(f"| {' | '.join([row, target, *cells])} |")
    return "\n".join(lines)


def gpu_table(results: Path = RESULTS) -> str:
    """Markdown of the families of GPUs: how many kernels each release of Triton compiled for one, how many of
    these have a problem, and a guided step of JoyImage at 1024 x 1024 pixels, as computed and as measured."""
    folder, measured = results / "kernels", measurements(results)
    versions = compiled_kernels.versions(folder)
    head = ["GPU", *(f"Triton {version}" for version in versions), "computed: floor, prediction", "measured"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for target, (name, known) in FAMILIES.items():
        counts = (compiled(folder, version, target) for version in versions)
        here = [run for run in measured if family(run["machine"]) == target]
        steps = ", ".join(map(computed, known)) or "-", ", ".join(map(step, here)) or "no"
        lines.append(f"| {' | '.join([f'{name} ({target})', *counts, *steps])} |")
    return "\n".join(lines)


def computed(gpu: str) -> str:
    """The least time of a step's products and attention, and what the step should take."""
    floor = roofline.floor_of_step("joyimage", roofline.GPUS[gpu])
    return f"{gpu} {floor:.2f}, {roofline.predicted_step('joyimage', roofline.GPUS[gpu]):.2f} s"


def step(run: Mapping[str, Any]) -> str:
    """A measured step, or that only other things were measured."""
    found = [row for row in run["rows"] if row["area"] == "step" and row["name"] == STEP]
    seconds = found[0].get("seconds") if found else None
    return run["machine"]["device"] + (f" {seconds:.2f} s" if seconds else ", but no step")


def compiled(folder: Path, version: str, target: str) -> str:
    """Of the kernels of one GPU: how many run, and how many of them spill or lack an instruction."""
    problems: dict[str, list[str]] = {}
    for file in op_cases.modules():
        rows = compiled_kernels.read(file, version, folder)
        problems |= {
            row: [] for row, found in rows.items() if "refused" not in found.get(target, {"refused": ""})
        }
        for row, where, what in compiled_kernels.all_problems(file, version, folder):
            if where == target:
                problems[row].append(what)
    said = [" ".join(found) for found in problems.values()]
    spill, slower = (sum(word in text for text in said) for word in ("spills", "no instruction"))
    if not said:
        return "-"
    run = len(said) - sum("compile" in text or "shared" in text for text in said)
    counts = [f"all {run}" if run == len(said) else f"{run} of {len(said)}"]
    counts += [f"{spill} spill"] * bool(spill) + [f"{slower} lack an instruction"] * bool(slower)
    return ", ".join(counts)


def measurements(results: Path) -> list[dict[str, Any]]:
    """What `python -m benchmarks.gpu` wrote on GPUs."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "gpu").glob("*.json"))]
    return [run for run in runs if not run["dry_run"]]


def family(machine: Mapping[str, Any]) -> str:
    """The name under which a GPU's kernels are compiled."""
    major, minor = machine["capability"].split(".")
    return {"4": "gfx942", "5": "gfx950"}.get(minor, "gfx") if machine["hip"] else f"sm_{major}{minor}"


def measured_table(results: Path = RESULTS) -> str:
    """Markdown of the blocks and denoising steps that GPUs were measured with, a column for each."""
    runs = measurements(results)
    if not runs:
        return "No GPU has measured this yet."
    machines = [run["machine"] for run in runs]
    said = (f"{m['device']}: {m['date']}, torch {m['torch']}, Triton {m['triton']}" for m in machines)
    head = ["measured", *(m["device"] for m in machines)]
    lines = [f"{'; '.join(said)}.", "", f"| {' | '.join(head)} |", f"| ---{' | ---:' * len(runs)} |"]
    cells: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        for row in run["rows"]:
            if row["area"] in ("block", "step") and (row["failed"] or "seconds" in row):
                mine = cells.setdefault(f"{row['area']}: {row['name']}", ["-"] * len(runs))
                mine[i] = figures(row)
    return "\n".join([*lines, *(f"| {' | '.join([name, *row])} |" for name, row in cells.items())])


def figures(row: Mapping[str, Any]) -> str:
    """Time, share of the device's peak and memory, where a row has them."""
    if row["failed"]:
        return "failed"
    if row["seconds"] is None:
        return row["why"]
    said = [quantity(row["seconds"], "s")]
    if row.get("share_of_peak") is not None:
        said.append(f"{100 * row['share_of_peak']:.0f} % of peak")
    if row.get("peak_bytes") is not None:
        said.append(f"{row['peak_bytes'] / 2**30:.1f} GiB")
    return ", ".join(said)


def flags_table(results: Path = RESULTS) -> str:
    """Markdown of the flags with which `joyedit estimate` says that the released models fit."""
    found = json.loads((results / "estimates" / "released.json").read_text(encoding="utf-8"))
    cards = list(next(iter(found.values()))["fits"])
    lines = [f"| an edit | {' | '.join(f'{card} GB' for card in cards)} |", f"|{' --- |' * (len(cards) + 1)}"]
    for name, row in found.items():
        lines.append(f"| {' | '.join([name, *map(with_flags, row['fits'].values())])} |")
    return "\n".join(lines)


def estimates_table(results: Path = RESULTS) -> str:
    """Markdown of peaks on a CPU: estimated, measured, and how far apart; a row for each stage."""
    found = json.loads((results / "estimates" / "measured.json").read_text(encoding="utf-8"))
    lines = [
        "| model with random weights | stage | `--memory` | estimated | measured | ratio |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for system, name in NAMES.items():
        for budget, row in found.get(system, {}).items():
            height, width = row["size"]
            for stage, said in row["estimated"].items():
                sizes = (f"{count / 2**20:.0f} MiB" for count in (said, row["measured"][stage]))
                what = f"{name}, {height} x {width}", stage, "-" if budget == "0" else budget
                lines.append(f"| {' | '.join([*what, *sizes, format(row['ratio'][stage], '.2f')])} |")
    return "\n".join(lines)


def machine_table(results: Path = RESULTS) -> str:
    """Markdown of what `joyedit estimate` says of the released models on GPUs."""
    found = json.loads((results / "estimates" / "released.json").read_text(encoding="utf-8"))
    cards, machines = list(next(iter(found.values()))["fits"]), ("RTX 4090", "H100")
    head = ["an edit", "files", "all of it", *(f"{card} GB" for card in cards), *machines]
    rule = ["---", "---:", "---:", *["---"] * len(cards), *["---:"] * len(machines)]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(rule)} |"]
    for name, row in found.items():
        sizes = (f"{count / 1e9:.1f} GB" for count in (row["disk"], max(row["peak"].values())))
        flags = [with_flags(said) for said in row["fits"].values()]
        times = (f"{row['times'][machine]:.3g} s" for machine in machines)
        lines.append(f"| {' | '.join([name, *sizes, *flags, *times])} |")
    return "\n".join(lines)


def scaling_table(results: Path = RESULTS) -> str:
    """Markdown of what a guided step takes on several GPUs, and how many times as fast that is."""
    found = json.loads((results / "scaling.json").read_text(encoding="utf-8"))["edits"]
    meshes = list(next(iter(found.values())))
    names = [" x ".join(mesh.split("x")) for mesh in meshes]
    lines = [f"| a step, cfg x sequence | {' | '.join(names)} |", f"| --- |{' ---: |' * len(meshes)}"]
    for edit, rows in found.items():
        for gpu in ("H100", "RTX 4090"):
            took = [rows[mesh]["computing"][gpu] + rows[mesh]["sending"][gpu] for mesh in meshes]
            cells = [f"{seconds:.3g} s, {took[0] / seconds:.1f}x" for seconds in took[1:]]
            lines.append(f"| {edit}, {gpu} | {' | '.join([f'{took[0]:.3g} s', *cells])} |")
    return "\n".join(lines)


def together_table(results: Path = RESULTS) -> str:
    """Markdown of the settings of a pipeline that go together; a column for each, by its number."""
    names = list(together.SETTINGS)
    head = ["setting", *(str(i + 1) for i in range(len(names)))]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for i, name in enumerate(names):
        cells = (
            "" if name == other else "no" if frozenset({name, other}) in together.APART else "yes"
            for other in names
        )
        lines.append(f"| {' | '.join([f'{i + 1}. {together.SETTINGS[name][0]}', *cells])} |")
    return "\n".join(lines)


def with_flags(said: str | None) -> str:
    """How an edit fits, where the row says itself which files it takes."""
    if said is None:
        return "no"
    flags = said.removeprefix("--quantize int8_convrot").strip()
    return f"`{flags}`" if flags else "yes"


def full_size_table(results: Path = RESULTS) -> str:
    """Markdown of edits by networks of the released sizes: what they held at most, what `joyedit estimate`
    says, with the interpreter, and what they moved."""
    found = json.loads((results / "full_size.json").read_text(encoding="utf-8"))
    lines = [
        "| an edit on a CPU | files | budget "
        "| held at most: all, anonymous, mapped | estimated | moved by a step | a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found.items():
        if name == "streaming":
            continue
        (denoising,) = (process for process in row["processes"] if "bytes_moved" in process)
        held = (max(p["peak"][kind] for p in row["processes"]) for kind in ("rss", "anonymous", "mapped"))
        cells = (
            f"{FULL_SIZE[name]}, {row['layers']} layers, {row['size'][0]} x {row['size'][1]}",
            f"{sum(sum(p['weights'].values()) for p in row['processes']) / 1e9:.1f} GB",
            f"{row['memory'] / 2**30:g} GiB",
            ", ".join(f"{nbytes / 2**30:.2f}" for nbytes in held) + " GiB",
            f"{(max(denoising['estimate']['peak'].values()) + RESERVED['cpu']) / 2**30:.2f} GiB",
            f"{denoising['bytes_moved'][-1] / 1e9:.1f} GB",
            quantity(denoising["seconds_of_later_steps"][-1], "s"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def streaming_sentence(results: Path = RESULTS) -> str:
    """Markdown of what streaming costs on a CPU where the file is in the cache."""
    row = json.loads((results / "full_size.json").read_text(encoding="utf-8"))["streaming"]
    return (
        f"When no block stays, a guided step of {row['layers']} blocks of the released width takes "
        f"{row['ratio']:.2f} times as long, and "
        f"{row['ratio_of_processor_seconds']:.2f} times the processor's "
        f"time (medians of {len(row['pairs'])} pairs in one process, the file in the cache)."
    )


def quantised_table(results: Path = RESULTS) -> str:
    """Markdown: what eight bits cost each network of the small models, and their edits."""
    found = json.loads((results / "quantised" / "small_models.json").read_text(encoding="utf-8"))
    lines = [
        "| model | form | error of the networks' outputs | PSNR of edits: median, least | right |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for name, model in found["models"].items():
        lines.append(f"| `{name}` | fp32 | - | - | {100 * model['right']:.1f} % of {model['edits']} |")
        for form, row in model["forms"].items():
            errors = (f"{100 * net['output']:.2g} % ({part})" for part, net in row["networks"].items())
            psnr = f"{row['psnr']['median']:.1f}, {row['psnr']['least']:.1f} dB"
            lines.append(f"| | {form} | {', '.join(errors)} | {psnr} | {100 * row['right']:.1f} % |")
    return "\n".join(lines)


def released_table(results: Path = RESULTS) -> str:
    """Markdown: bytes of the released networks."""
    found = json.loads((results / "quantised" / "small_models.json").read_text(encoding="utf-8"))
    lines = ["| network | bf16 | int8_convrot | fp8 |", "| --- | ---: | ---: | ---: |"]
    for name, sizes in found["released"].items():
        cells = [f"{sizes[f'bytes_{form}'] / 1e9:.1f} GB" for form in ("bf16", "int8_convrot", "fp8")]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def steps_table(results: Path = RESULTS) -> str:
    """Markdown: edits of the small models at three thresholds of a step cache."""
    found = json.loads((results / "step_cache" / "small_models.json").read_text(encoding="utf-8"))
    lines = [
        "| model | `step_cache` | steps computed, mean | PSNR of edits: median, least | right |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, model in found["models"].items():
        lines.append(
            f"| `{name}` | - | {model['steps']} | - | {100 * model['right']:.1f} % of {model['edits']} |"
        )
        for threshold, row in model["thresholds"].items():
            psnr = f"{row['psnr']['median']:.1f}, {row['psnr']['least']:.1f} dB"
            lines.append(f"| | {threshold} | {row['computed']:.1f} | {psnr} | {100 * row['right']:.1f} % |")
    return "\n".join(lines)


def training_table(results: Path = RESULTS) -> str:
    """Markdown: what a step of training takes beside diffusers and PEFT, in time and memory."""
    found = json.loads((results / "training.json").read_text(encoding="utf-8"))
    facts = found["machine"]
    lines = [
        f"Measured {facts['date']} on {facts['cpu']}, {facts['threads']} threads; torch {facts['torch']}, "
        f"diffusers {facts['diffusers']}, peft {facts['peft']}.",
        "",
        "| what | shape | time: reference, ours | ratio | memory: both | ratio | gradients apart |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found["rows"].items():
        system, _, mode = name.partition(", ")
        times = [quantity(row[f"seconds_{side}"], "s") for side in ("reference", "ours")]
        sizes = [f"{row[f'bytes_{side}'] / 1e6:.0f} MB" for side in ("reference", "ours")]
        cells = [f"{NAMES[system]}, {mode}", row["shape"]]
        cells += [", ".join(times), f"{row['time_ratio']:.2f}x"]
        cells += [", ".join(sizes), f"{row['memory_ratio']:.2f}x", distance(row["difference"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "edits": edits_table,
    "gpus": gpu_table,
    "kernels": kernel_table,
    "problems": problem_table,
    "measured": measured_table,
    "small": small_table,
    "machines": flags_table,
    "released_machines": machine_table,
    "estimates": estimates_table,
    "together": together_table,
    "scaling": scaling_table,
    "full_size": full_size_table,
    "streaming": streaming_sentence,
    "training": training_table,
    "learned": learned_sentence,
    "kept": kept_table,
    "drift": drift_sentence,
    "drifts": drift_table,
    "quantised": quantised_table,
    "released": released_table,
    "steps": steps_table,
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
