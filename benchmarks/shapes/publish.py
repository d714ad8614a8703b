"""Put a trained checkpoint into the package, with a model card of nothing but recorded figures.

    python -m benchmarks.shapes.publish joyimage --run runs/joyimage --vae-run runs/wan-vae

It copies the checkpoint, with the autoencoder as it is now, to `joyedit/assets/tiny-joyimage`, evaluates it
there, writes the figures and what the trainings wrote down to `benchmarks/results/shapes/joyimage.json`, the
card from that, and the map of its previews to `joyedit/assets/previews.json`. Without `--vae-run`, the
training in `--run` began with the checkpoint that is in the package, and is added to what is recorded of it.
Without `--run`, only the card is written again.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import previews
from benchmarks.shapes import evaluate, made_for, train
from joyedit.models.sd_vae import AutoencoderKL
from joyedit.models.wan_vae import AutoencoderKLWan

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "shapes"
ASSETS = ROOT / "joyedit" / "assets"
CURVE_POINTS = 60


class System(NamedTuple):
    """What a card says of a model beside its figures. `counts`: shapes in a scene of the evaluation."""

    title: str
    vae: str
    networks: str
    pixels: int
    counts: tuple[int, ...]
    judged: str
    remark: str  # on the training: where the code is not exactly what ran


OF_EDITS = (
    "An edit of a held-out scene succeeds when the mean error in the changed region is below 8 % of the full "
    "range, everything else comes back with at least 26 dB, and each new shape has the outline of the true "
    "one (IoU above 0.75, and no other shape fits better)."
)
SYSTEMS = {
    "joyimage": System(
        "JoyAI-Image-Edit",
        "wan-vae",
        "MMDiT, Qwen3-VL and the WAN autoencoder",
        96,
        evaluate.COUNTS,
        f"{OF_EDITS} Scenes of one to four shapes, 2 steps, no guidance.",
        "The code was changed a little at 23,000 samples: until there the loss of a new run is up to 3 "
        "percent lower.",
    ),
    "chronoedit": System(
        "ChronoEdit",
        "wan-vae",
        "WAN transformer, UMT5, CLIP vision tower and the WAN autoencoder",
        96,
        (1, 2, 2),
        f"{OF_EDITS} Judged is the last frame: of 5 (`model`), and after temporal reasoning about 29 in the "
        "first half of the steps (`reasoning`). Scenes of one and two shapes, no guidance. Replaced shapes "
        "and backgrounds were left out of most of the first training.",
        "Until 54,000 samples a part of the first layer learned more slowly than the code now has it; from "
        "60,000 to 68,000 all kinds were drawn, in scenes of up to four shapes. In the second training a few "
        "words in capitals (A, REMOVE within a sentence) began as other rows than the code now gives them.",
    ),
    "diffedit": System(
        "Stable Diffusion for DiffEdit",
        "sd-vae",
        "UNet, CLIP text encoder and autoencoder",
        64,
        (1, 2),
        f"{OF_EDITS} Scenes of one and two shapes. A caption does not say how large a new shape is, so of "
        "replaced ones the outline asks for more than the words do.",
        "The plan was shortened while it ran; the code has its phases and rates as they were, to within a "
        "percent. From that checkpoint on, three in five samples began, as an edit does, with another scene "
        "in the noise: the same scene before one shape became another or changed its colour.",
    ),
}
AUTOENCODERS = {"wan-vae": AutoencoderKLWan, "sd-vae": AutoencoderKL}
COLUMNS = {
    "inside": "error inside",
    "outside": "PSNR outside (dB)",
    "overlap": "shape IoU",
    "iou": "mask IoU",
    "mean_iou": "mean mask IoU",
    "masked": "PSNR outside the mask (dB)",
}
CARD = """---
license: apache-2.0
library_name: joyedit
tags: [image-editing]
---

# tiny-{name}

A small {system} of the published architecture ({networks}), trained from
nothing for {minutes:.0f} minutes on one processor core. It edits drawn scenes of coloured shapes, offline and
in seconds; it exists to be seen working, and for tests on outputs that mean something. Photographs, and
words of another world, are edited all the same, but hardly well.

## Data

Procedurally drawn scenes (`benchmarks/shapes/scenes.py`), {pixels} pixels wide: six shapes in eight colours
on eight backgrounds, with instructions or captions in English and the exact result. There are no photographs,
no texts and no weights of others in it, and the vocabulary was made of the world's own sentences; no other
licence applies.

## Training

```bash
{commands}
```

{facts}

{remark} The curve, and everything below, is in `benchmarks/results/shapes/{name}.json`.

## Scores

{scores}
"""


def record(name: str, run: Path, vae_run: Path, seed: int) -> dict[str, Any]:
    """The figures of the checkpoint in the package, and samples, time and curve of both trainings."""
    results = scored(name)
    vae = SYSTEMS[name].vae
    stages = [folder.parent.name for folder in sorted(vae_run.glob("*/metrics.jsonl"), key=_started)]
    results["training"] = {
        "commands": [
            f"python -m benchmarks.shapes.train {vae} --out runs/{vae} --seed {seed}",
            f"python -m benchmarks.shapes.train {name} --vae runs/{vae}/vae --out runs/{name} --seed {seed}",
        ],
        "seed": seed,
        "autoencoder": {stage: summary(read_metrics(vae_run / stage)) for stage in stages},
        "editor": summary(read_metrics(run)),
    }
    results["curve"], results["curve_ok"] = curves(run)
    return results


def record_more(name: str, run: Path, seed: int, before: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the checkpoint in the package, whose training went on in `run`. `before`: what was
    recorded until then."""
    training = before["training"]
    told = f"--from runs/{name}/checkpoint --out runs/{name}-more --seed {seed}"
    training = {
        **training,
        "commands": [*training["commands"], f"python -m benchmarks.shapes.train {name} {told}"],
        "more": summary(read_metrics(run)),
    }
    more, more_ok = curves(run)
    old = {key: before[key] for key in ("curve", "curve_ok")}
    return {**scored(name), "training": training, **old, "curve_more": more, "curve_more_ok": more_ok}


def scored(name: str) -> dict[str, Any]:
    """What the checkpoint in the package reaches, in all wordings, and its picture."""
    report, picture = evaluate.evaluate_checkpoint(
        ASSETS / f"tiny-{name}", evaluate.EDITS, SYSTEMS[name].counts, wordings=True
    )
    picture.save(RESULTS / f"{name}.png")
    weights = (ASSETS / f"tiny-{name}").rglob("*.safetensors")
    return {"bytes": sum(file.stat().st_size for file in weights), "held_out": report}


def curves(run: Path) -> tuple[list[dict[str, float]], list[list[float]]]:
    """The losses and the held-out success of a training, thinned."""
    metrics = read_metrics(run)
    lines = [line for line in metrics if "loss" in line]
    kept = lines[: CURVE_POINTS // 3] + thinned(lines[CURVE_POINTS // 3 :], CURVE_POINTS * 2 // 3)
    keys = ("samples", "cpu_minutes", "loss")
    success = [[line["samples"], line["ok"]] for line in thinned([m for m in metrics if "ok" in m], 40)]
    return [{key: line[key] for key in keys} for line in kept], success


def _started(metrics: Path) -> str:
    return read_metrics(metrics.parent)[0]["time"]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def summary(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What a training took, and the last held-out figures of an autoencoder."""
    scored = [line for line in metrics if "psnr" in line]
    scores = {key: scored[-1][key] for key in ("psnr", "worst")} if scored else {}
    # What came after the last sample was only found finished when the command was given again.
    last = next(line for line in metrics if line["samples"] == metrics[-1]["samples"])
    return {**{key: last[key] for key in ("samples", "cpu_minutes")}, "ended": last["time"], **scores}


def thinned(lines: list[Any], count: int) -> list[Any]:
    """At most `count` of them, evenly, the last one among them."""
    step = -(-len(lines) // count) or 1
    return lines[::-1][::step][::-1]


def card(name: str, results: Mapping[str, Any]) -> str:
    """The model card, Markdown."""
    system, training = SYSTEMS[name], results["training"]
    parts = {
        **{f"autoencoder, {k}": v for k, v in training["autoencoder"].items()},
        "editor": training["editor"],
    }
    if "more" in training:
        parts["editor, from that checkpoint on, in varied wording"] = training["more"]
    facts = [f"Seed {training['seed']}. On one core of an x86 processor with AVX2, fp32:", ""]
    for what, part in parts.items():
        psnr = f"; {part['psnr']:.1f} dB held-out, worst {part['worst']:.1f} dB" if "psnr" in part else ""
        facts.append(
            f"- {what}: {part['samples']:,} samples, {part['cpu_minutes']:.0f} minutes of one core, ended "
            f"{part['ended'].replace('T', ' ').replace('Z', ' UTC')}{psnr}"
        )
    return CARD.format(
        name=name,
        system=system.title,
        networks=system.networks,
        minutes=sum(part["cpu_minutes"] for part in parts.values()),
        pixels=system.pixels,
        commands="\n".join(training["commands"]),
        facts="\n".join(facts),
        remark=system.remark,
        scores="\n".join([system.judged, "", *scores(results["held_out"])]),
    )


def scores(held_out: Mapping[str, Any]) -> list[str]:
    """Success by kind beside that of doing nothing and of the autoencoder, and medians; Markdown lines."""
    sides = {name: side for name, side in held_out.items() if "kinds" in side}
    model, rows = next(iter(sides)), sides[next(iter(sides))]["kinds"]
    columns = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows.values())}
    lines = _table(
        ["kind", "edits", *sides, *columns.values()],
        (
            [kind, row["edits"], *(f"{100 * side['kinds'][kind]['ok']:.0f} %" for side in sides.values())]
            + ["-" if row.get(key) is None else row[key] for key in columns]
            for kind, row in rows.items()
        ),
    )
    lines += ["", f"Shares of edits that succeed; the last columns are medians of `{model}`."]
    if known := [kind for kind, row in rows.items() if row["ok"] >= 0.8]:
        lines += ["", f"What it knows, by 80 % and more: {', '.join(known)}."]
    if "wordings" in held_out:
        lines += ["", *_wordings(held_out["wordings"])]
    if "way" in held_out:
        lines += ["", *_way(held_out["way"])]
    return lines


def _wordings(wordings: Mapping[str, Any]) -> list[str]:
    """Success in every wording, Markdown lines."""
    kinds = next(iter(wordings.values()))["kinds"]
    return [
        f"{next(iter(wordings.values()))['edits']} of these edits, asked for in other letters and politely "
        "(`benchmarks/shapes/wording.py`):",
        "",
        *_table(
            ["wording", "all", *kinds],
            (
                [name, *(f"{100 * ok:.0f} %" for ok in (said["ok"], *said["kinds"].values()))]
                for name, said in wordings.items()
            ),
        ),
    ]


def _way(way: Mapping[str, Any]) -> list[str]:
    """How near films are to the drawn ones, Markdown lines."""
    sides = {name: side for name, side in way.items() if name != "films"}
    frames = [str(4 * i) for i in range(len(sides["model"]["key_frames"]))]
    return [
        f"The way there, in {way['films']} films of 29 frames: PSNR in dB against the drawn film, of the key "
        "frames and of those between.",
        "",
        *_table(
            ["film", *frames, "between"],
            ([name, *side["key_frames"], side["between"]] for name, side in sides.items()),
        ),
    ]


def _table(head: list[str], body: Iterable[list[Any]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, rule, *body)]


def install(checkpoint: Path, vae: Path, target: Path) -> None:
    """Copy a checkpoint to where the package looks for it, and say there what it was made for; its
    autoencoder, which may have learned since, is stored as the networks are, in bf16. What was there is
    replaced only when all of it is made."""
    name = target.name.removeprefix("tiny-")
    kind = AUTOENCODERS[SYSTEMS[name].vae]
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / target.name
        shutil.copytree(checkpoint, made, ignore=shutil.ignore_patterns("vae"))
        kind.from_pretrained(vae).to(torch.bfloat16).save_pretrained(made / "vae")
        made_for.stamp(made, name)
        shutil.rmtree(target, ignore_errors=True)
        made.replace(target)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes.publish", description=__doc__)
    parser.add_argument("name", choices=train.EDITORS)
    parser.add_argument("--run", type=Path, help="folder of the editor's training")
    parser.add_argument("--vae-run", type=Path, help="folder of its autoencoder's")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.run is None and given.vae_run is not None:
        parser.error("--vae-run goes with --run")
    file, target = RESULTS / f"{given.name}.json", ASSETS / f"tiny-{given.name}"
    if given.vae_run is None:
        results = json.loads(file.read_text(encoding="utf-8"))
        if given.run is not None:
            install(given.run / "checkpoint", target / "vae", target)
            results = record_more(given.name, given.run, given.seed, results)
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    else:
        install(given.run / "checkpoint", given.vae_run / "vae", target)
        previews.write_shipped()
        results = record(given.name, given.run, given.vae_run, given.seed)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (target / "README.md").write_text(card(given.name, results), encoding="utf-8")


if __name__ == "__main__":
    main()
