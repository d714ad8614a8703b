"""Fit the maps of previews (`joyedit/pipelines/previews.py`), and write them with their errors.

    python -m benchmarks.previews                                      # those of the small models
    python -m benchmarks.previews --model FOLDER --pictures FOLDER     # that of another autoencoder

The small models' are fitted to drawn scenes of their training and judged by held-out ones; another's to every
second picture of the folder, and judged by the others. `joyedit/assets/previews.json` holds, by the
autoencoder's fingerprint, for whom a map is, its numbers, the PSNR (dB) and the share of the variance (`r2`)
on the pictures that judged it, how many these were, and the same figures of the map that is fitted to drawn
shapes where none is stored (`drawn`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import joyedit
from benchmarks.shapes import scenes, sd_vae
from joyedit.media import images as im
from joyedit.pipelines import previews

SHIPPED = {"tiny-joyimage": scenes.SIZE, "tiny-chronoedit": scenes.SIZE, "tiny-diffedit": sd_vae.SIZE}
SCENES = 64  # to fit to, and as many to judge by
DIGITS = 5


def drawn_scenes(split: str, side: int, count: int = SCENES) -> Tensor:
    """Results of edits in the small models' world, (count, 3, side, side) in [-1, 1]."""
    edits = (scenes.make_edit(i, split) for i in range(count))
    pictures = np.stack([scenes.draw(edit.target, side) for edit in edits])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1


def pictures_of(folder: Path, side: int = 512) -> Tensor:
    """Those of a folder in the order of their names, their middle, (B, 3, side, side) in [-1, 1]."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".webp"))
    pictures = [im.resize_center_crop(joyedit.load_image(file), side, side) for file in files]
    return im.to_latent_input(pictures)[:, :, 0]


@torch.no_grad()
def entry(vae: previews.Autoencoder, fit_to: Tensor, judge: Tensor) -> dict[str, Any]:
    """Numbers and errors; pictures (B, 3, H, W) in [-1, 1], which are encoded one by one."""

    def encode(pictures: Tensor) -> Tensor:
        return torch.cat([previews.encode(vae, picture) for picture in pictures.to(vae.device).split(1)])

    fitted = previews.fit_map(encode(fit_to), fit_to)
    weight, bias = (torch.round(x, decimals=DIGITS) for x in (fitted.weight, fitted.bias))
    seen = encode(judge).cpu()
    judged = previews.PreviewMap(weight, bias, 0, 0).judged_by(seen, judge)
    shapes = previews.dead_leaves(previews.DRAWN, previews.CELLS * previews.pixels_per_latent(vae))
    drawn = previews.fit_map(encode(shapes), shapes).judged_by(seen, judge)
    return {
        "weight": [[round(value, DIGITS) for value in row] for row in weight.tolist()],
        "bias": [round(value, DIGITS) for value in bias.tolist()],
        **errors(judged),
        "pictures": len(judge),
        "drawn": errors(drawn),
    }


def errors(judged: previews.PreviewMap) -> dict[str, float]:
    return {"psnr": round(judged.psnr, 2), "r2": round(judged.r2, 4)}


def write_shipped() -> None:
    """Write the file anew, with the small models' autoencoders; one that two of them share stands there
    once. Others that were in it stay."""
    made: dict[str, Any] = {}
    for name, side in SHIPPED.items():
        vae = joyedit.load(name, device="cpu", dtype=torch.float32).vae
        key = previews.fingerprint(vae)
        if key in made:
            made[key]["of"].append(name)
        else:
            made[key] = {
                "of": [name],
                **entry(vae, drawn_scenes("train", side), drawn_scenes("held-out", side)),
            }
    shipped = set(SHIPPED)
    write({**{k: one for k, one in stored().items() if not shipped & set(one["of"])}, **made})


def stored() -> dict[str, Any]:
    return json.loads(previews.STORED.read_text(encoding="utf-8")) if previews.STORED.exists() else {}


def write(entries: dict[str, Any]) -> None:
    """An autoencoder a line."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(one)}" for key, one in entries.items())
    previews.STORED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.previews", description=__doc__)
    parser.add_argument("--model", help="folder or name of a checkpoint; with --pictures")
    parser.add_argument("--pictures", type=Path, help="folder of pictures to fit to and to judge by")
    given = parser.parse_args(arguments)
    if (given.model is None) != (given.pictures is None):
        parser.error("--model and --pictures go together")
    if given.model is None:
        write_shipped()
    else:
        vae, pictures = joyedit.load(given.model).vae, pictures_of(given.pictures)
        made = {"of": [Path(given.model).name], **entry(vae, pictures[::2], pictures[1::2])}
        write({**stored(), previews.fingerprint(vae): made})
    for one in stored().values():
        print(", ".join(one["of"]), {name: one[name] for name in ("psnr", "r2", "pictures", "drawn")})


if __name__ == "__main__":
    main()
