"""What an edit does to the rest of the picture: how far it shifts and scales it, and what becomes of colours.

Scale is found by phase correlation of log-polar spectra, in which it is a shift, and refined to where the
phase correlation of the pictures themselves, the scale undone, is highest; shift is the place of that. Both
look at gradients, which do not care about colours, through a window that fades to the borders, and at the low
half of frequencies, which no resampling changes. Colours are compared after both are undone, outside the
edit: where a mask says so, or else where a picture does not differ more than most of it does.

The result's frame is what counts: whole input laid on whole result, of whatever sizes, is no drift. Positive
shifts are down and to the right, in pixels of the result; above 1 the result is enlarged about its middle.

    python -m benchmarks.drift                      # all small models, to benchmarks/results/drift/
    python -m benchmarks.drift --model tiny-diffedit
    python -m benchmarks.drift FOLDER --out drift.json

A folder holds NAME.png with NAME-edit*.png and perhaps NAME-mask.png (white: the edit), or folders input/,
output/ (NAME.png, NAME-*.png) and perhaps mask/.

It needs scipy and scikit-image (`pip install -e .[test]`).

H, W pixels of the result
Source: Kuglin and Hines 1975; Reddy and Chatterji 1996; Guizar-Sicairos et al. 2008.
"""

import argparse
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage, optimize
from skimage.color import rgb2lab
from skimage.transform import warp_polar

RESULTS = Path(__file__).resolve().parent / "results" / "drift"
MODELS = ("tiny-joyimage", "tiny-chronoedit", "tiny-diffedit")
EDITS, COUNTS = 20, (3, 4)  # held-out edits of each kind; shapes in a scene, so that two are left
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}

LONGEST = 512  # pixels of the longer side in which shift and scale are found
GRADIENT = 0.7  # pixels, standard deviation of the smoothing in which a gradient is taken
REACH = 3  # pixels that it looks to each side
SOFT = 2.0  # pixels, standard deviation of the edge of a mask
CUT = 0.08  # cycles per pixel, standard deviation of the weight of frequencies
FLOOR = 0.1  # of the mean strength: much weaker frequencies are noise, and count less
ANGLES, RADII = 180, 512  # of a log-polar spectrum
LOWEST = 128  # of RADII: those before it hold what the window does
LARGEST = 2.0  # scale that is looked for, and its inverse
NEAR = 0.03  # of the first estimate: where the scale is refined
AGREEMENT = 0.5  # least height of the peak, 1 for equal pictures: below it nothing is said of shift and scale
CONTENT = 0.002  # least mean gradient, with nothing where the edit is, of the full range per pixel
NOTICED = 2.3  # CIE Lab: differences this small are no edit, whatever the rest of the picture does


# Shift, scale and agreement, as in Drift.
Geometry = tuple[tuple[float, float] | None, float | None, float]


class Drift(NamedTuple):
    """shift (down, right) in pixels, scale; None where the pictures have too little in common to say it.
    agreement: height of the peak of phase correlation. colour: result minus input outside the edit, mean of
    red, green and blue in levels of 8 bits, and delta_e the mean distance there in CIE Lab (1976); None where
    nothing is outside."""

    shift: tuple[float, float] | None
    scale: float | None
    agreement: float
    colour: tuple[float, float, float] | None
    delta_e: float | None


def measure(before: np.ndarray, after: np.ndarray, edited: np.ndarray | None = None) -> Drift:
    """before: the input in the result's size, after: the result, both (H, W, 3) in [0, 1]. edited: (H, W)
    bool, where the edit is, None where nobody knows."""
    everything = edited is not None and edited.all()
    found = geometry(grey(before), grey(after), None if everything else edited)
    if edited is None:  # once more, without what the first look takes for the edit
        differs = ~kept(rgb2lab(laid_back(after, found)) - rgb2lab(before))
        again = geometry(grey(before), grey(after), ndimage.binary_opening(differs))
        found = max(found, again, key=lambda one: one[2])
    colour = delta_e = None
    if not everything:
        colour, delta_e = colours(before, laid_back(after, found), edited)
    return Drift(*found, colour, delta_e)


def laid_back(picture: np.ndarray, found: Geometry) -> np.ndarray:
    """A result (H, W, 3) without its drift, as far as that is known."""
    shift, scale, _ = found
    if shift is None or scale is None:
        return picture
    return np.stack([undone(spline(plane), shift, scale) for plane in planes(picture)], -1).clip(0, 1)


def grey(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W), its luma."""
    return picture @ np.array([0.299, 0.587, 0.114])


def planes(picture: np.ndarray) -> Iterator[np.ndarray]:
    return (picture[..., channel] for channel in range(picture.shape[-1]))


# Shift and scale
def geometry(before: np.ndarray, after: np.ndarray, edited: np.ndarray | None = None) -> Geometry:
    """Of grey pictures (H, W)."""
    height, width = before.shape
    zoom = min(LONGEST / max(height, width), 1.0)
    weight = np.ones((height, width)) if edited is None else 1.0 - edited
    if zoom < 1:
        size = (max(round(width * zoom), 1), max(round(height * zoom), 1))
        before, after, weight = (resize(plane, size) for plane in (before, after, weight))
    # Where no gradient sees the edit, with a soft edge.
    weight = ndimage.gaussian_filter(ndimage.minimum_filter(weight, 2 * REACH + 1), SOFT)
    weight = np.clip(2 * weight - 1, 0, 1)
    fading = np.outer(*(np.hanning(n + 2)[1:-1] for n in before.shape))
    window = weight * fading
    seen = gradient(before) * window
    if np.abs(seen).mean() < CONTENT * fading.mean():
        return None, None, 0.0

    moved = spline(after)

    def correlated(scale: float, shift: Sequence[float]) -> tuple[np.ndarray, float]:
        """How far they are shifted beyond that, and the height of the peak."""
        return peak(seen, gradient(undone(moved, shift, scale)) * window)

    starts = []
    for scale in (1.0, scale_of_spectra(seen, gradient(after) * window)):
        rest, height_of_peak = correlated(scale, (0.0, 0.0))
        starts.append((height_of_peak, scale, rest * scale))
    agreement, scale, shift = max(starts, key=lambda start: start[0])
    near = NEAR
    for _ in range(3):
        found = optimize.minimize_scalar(
            lambda scale, shift=shift: -correlated(scale, shift)[1],
            bounds=(scale - near, scale + near),
            method="bounded",
            options={"xatol": 1e-4},
        )
        scale, near = float(found.x), near / 3
        rest, agreement = correlated(scale, shift)
        shift = shift + rest * scale
    if agreement < AGREEMENT:
        return None, None, agreement
    down, right = shift / zoom
    return (float(down), float(right)), scale, agreement


def gradient(plane: np.ndarray) -> np.ndarray:
    """(H, W) -> complex, right + i down: one picture of edges in all directions."""
    right, down = (ndimage.gaussian_filter(plane, GRADIENT, order=order) for order in ((0, 1), (1, 0)))
    return right + 1j * down


def spline(plane: np.ndarray) -> np.ndarray:
    """What `undone` takes."""
    return ndimage.spline_filter(plane, 3)


def undone(plane: np.ndarray, shift: Sequence[float], scale: float) -> np.ndarray:
    """The `spline` of a picture (H, W), moved and scaled back."""
    middle = (np.array(plane.shape) - 1) / 2
    offset = middle - scale * middle + shift
    return ndimage.affine_transform(plane, [scale, scale], offset, order=3, mode="nearest", prefilter=False)


def peak(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, float]:
    """Phase correlation of two windowed pictures (H, W): the shift of `after`, to a hundredth of a pixel, and
    the height there, 1 for equal ones. Negatives are equal, too."""
    cross = np.fft.fft2(after) * np.conj(np.fft.fft2(before))
    down, right = (np.fft.fftfreq(n) for n in cross.shape)
    weight = np.exp(-(down[:, None] ** 2 + right**2) / (2 * CUT**2))
    strength = np.abs(cross)
    floor = FLOOR * (weight * strength).sum() / weight.sum() + np.finfo(float).tiny
    weight /= strength + floor
    cross *= weight / (weight * strength).sum().clip(np.finfo(float).tiny)

    surface = np.abs(np.fft.ifft2(cross))
    shift = np.array(np.unravel_index(surface.argmax(), surface.shape), float)
    shift -= np.where(shift > np.array(surface.shape) / 2, surface.shape, 0)
    height = 0.0
    for step in (0.2, 0.04, 0.01):  # the surface between pixels, by its Fourier sum
        around = step * np.arange(-5, 6)
        rows = np.exp(2j * np.pi * np.outer(shift[0] + around, down))
        columns = np.exp(2j * np.pi * np.outer(right, shift[1] + around))
        heights = np.abs(rows @ cross @ columns)
        best = np.unravel_index(heights.argmax(), heights.shape)
        shift, height = shift + around[list(best)], float(heights[best])
    return shift, height


def scale_of_spectra(before: np.ndarray, after: np.ndarray) -> float:
    """How much larger `after` is: spectra forget shifts, and log-polar ones are shifted by a scale. 1 for
    what is beyond LARGEST."""
    side = max(before.shape)
    spectra = []
    for picture in (before, after):
        spectrum = np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(picture, (side, side)))))
        polar = warp_polar(
            spectrum, (side // 2, side // 2), radius=side / 2, output_shape=(ANGLES, RADII), scaling="log"
        )[:, LOWEST:]
        spectra.append((polar - polar.mean()) * np.hanning(RADII - LOWEST))
    (_, outward), _ = peak(*spectra)
    scale = float(np.exp(-outward * np.log(side / 2) / RADII))
    return scale if 1 / LARGEST < scale < LARGEST else 1.0


def resize(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size, Image.Resampling.LANCZOS), float)


# Colours
def colours(
    before: np.ndarray, after: np.ndarray, edited: np.ndarray | None
) -> tuple[tuple[float, float, float], float]:
    """Mean difference of red, green and blue, and distance in CIE Lab, see Drift; a mask leaves something."""
    labs = rgb2lab(after) - rgb2lab(before)
    outside = kept(labs) if edited is None else ~edited
    red, green, blue = (255 * (after - before)[outside]).mean(0)
    return (float(red), float(green), float(blue)), float(np.linalg.norm(labs[outside], axis=-1).mean())


def kept(difference: np.ndarray) -> np.ndarray:
    """Where the differences (H, W, 3) in CIE Lab are about those of most pixels."""
    distance = np.linalg.norm(difference - np.median(difference, axis=(0, 1)), axis=-1)
    return distance <= max(3 * 1.4826 * np.median(distance), NOTICED)


# What is measured
def pairs_of(folder: Path) -> Iterator[tuple[str, Path, Path, Path | None]]:
    """Name, input, result and mask of every pair in a folder, in the order of names. Raises FileNotFoundError
    for a folder without one."""
    apart = (folder / "input").is_dir() and (folder / "output").is_dir()
    inputs, outputs = (pictures(folder / part if apart else folder) for part in ("input", "output"))
    masks = {path.stem: path for path in pictures(folder / "mask")} if (folder / "mask").is_dir() else {}
    masks |= {path.stem.removesuffix("-mask"): path for path in inputs if path.stem.endswith("-mask")}
    found = 0
    for before in inputs:
        for after in outputs:
            mine = after.stem.startswith(f"{before.stem}-" if apart else f"{before.stem}-edit")
            if mine or (apart and after.stem == before.stem):
                found += 1
                yield after.stem, before, after, masks.get(before.stem)
    if not found:
        raise FileNotFoundError(f"{folder} holds no NAME.png with NAME-edit*.png, and no input/ with output/")


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def measure_files(before: Path, after: Path, mask: Path | None) -> Drift:
    """Raises ValueError for a mask of neither size."""
    from joyedit.media.images import load_image

    first, second = load_image(str(before)), load_image(str(after))
    edited = None
    if mask is not None:
        white = load_image(str(mask)).convert("L")
        if white.size not in (first.size, second.size):
            raise ValueError(f"{mask} is {white.size}, the pictures {first.size} and {second.size}")
        edited = np.asarray(white.resize(second.size, Image.Resampling.NEAREST)) > 127
    if first.size != second.size:
        first = first.resize(second.size, Image.Resampling.LANCZOS)
    return measure(*(np.asarray(picture, float) / 255 for picture in (first, second)), edited)


def measure_model(name: str, count: int = EDITS) -> dict[str, list[Drift]]:
    """Of held-out drawn scenes, kind of edit -> each of `count`: outside what the edit changes, which is
    known, and where that is everything, in shift and scale alone."""
    from benchmarks.shapes import evaluate, evaluate_diffedit, scenes
    from joyedit.loading.layouts import load, pipeline_name

    system = pipeline_name(name)
    kinds = evaluate.EVALUATIONS[system][1]
    pipe = load(name, device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    if system == "StableDiffusionDiffEditPipeline":
        cases = evaluate_diffedit.held_out(count, (2,), kinds)
        edits = [case.edit for case in cases]
        results = [answer.picture for answer in evaluate_diffedit.run(pipe, cases)]
    else:
        edits = evaluate.held_out(count, COUNTS, kinds)
        module = importlib.import_module(evaluate.EVALUATIONS[system][0])
        results = module.run(pipe, edits, module.STEPS)
    found: dict[str, list[Drift]] = {}
    for edit, result in zip(edits, results, strict=True):
        size = len(result)
        # With its neighbours, which see it through the autoencoder.
        changed = ndimage.binary_dilation(edit.changed(size), iterations=2)
        edited = changed if edit.kind in scenes.LOCAL else np.ones_like(changed)
        drift = measure(scenes.draw(edit.source, size), np.asarray(result, float), edited)
        found.setdefault(edit.kind, []).append(drift)
    return found


def summary(drifts: Iterable[Drift]) -> dict[str, Any]:
    """How many pairs; of those that are placed the shift in pixels and scale - 1, and of those with anything
    outside the edit the colours in levels and the distance in CIE Lab: each as `spread`."""
    drifts = list(drifts)
    placed = [(drift.shift, drift.scale) for drift in drifts if drift.shift is not None]
    coloured = [(drift.colour, drift.delta_e) for drift in drifts if drift.colour is not None]
    shifts, scales = (np.array(values) for values in zip(*placed, strict=True)) if placed else ([], [])
    levels, distances = (np.array(values) for values in zip(*coloured, strict=True)) if coloured else ([], [])
    return {
        "pairs": len(drifts),
        "placed": len(placed),
        "shift": spread(shifts, 3),
        "scale": spread(np.subtract(scales, 1), 5),
        "coloured": len(coloured),
        "colour": spread(levels, 2),
        "delta_e": spread(distances, 3),
    }


def spread(values: Sequence[Any] | np.ndarray, digits: int) -> dict[str, Any] | None:
    """The mean, which is what happens every time, and of the amounts (the lengths of vectors) the median and
    the 95th percentile; None of nothing."""
    if not len(values):
        return None
    amounts = np.linalg.norm(np.reshape(values, (len(values), -1)), axis=1)
    return {
        "mean": np.mean(values, 0).round(digits).tolist(),
        "median": round(float(np.median(amounts)), digits),
        "95 %": round(float(np.quantile(amounts, 0.95)), digits),
    }


def said(drift: Drift) -> str:
    """One line."""
    if drift.shift is None:
        where = f"too little in common ({drift.agreement:.2f}) to say shift and scale"
    else:
        where = f"shift {drift.shift[0]:+.2f} down {drift.shift[1]:+.2f} right, scale {drift.scale:.4f}"
    if drift.colour is None:
        return where
    red, green, blue = drift.colour
    return f"{where}, colour {red:+.1f} {green:+.1f} {blue:+.1f}, delta E {drift.delta_e:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drift",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, help="with pairs of pictures")
    parser.add_argument("--model", help="a small model, whose edits of drawn scenes are measured")
    parser.add_argument("--edits", type=int, default=EDITS, help=f"of each kind, default {EDITS}")
    parser.add_argument("--out", type=Path, help="JSON to write")
    given = parser.parse_args(arguments)
    if given.folder is not None:
        if given.model is not None:
            parser.error("give a folder or a model")
        report: dict[str, Any] = {}
        for name, *files in pairs_of(given.folder):
            report[name] = measure_files(*files)
            print(name, said(report[name]), flush=True)
        write({"summary": summary(report.values()), **{n: d._asdict() for n, d in report.items()}}, given.out)
        return
    if given.model is None and given.out is not None:
        parser.error("--out is for a folder or one --model")
    for name in MODELS if given.model is None else (given.model,):
        kinds = measure_model(name, given.edits)
        report = {kind: summary(drifts) for kind, drifts in kinds.items()}
        everything = summary(drift for drifts in kinds.values() for drift in drifts)
        print(name, json.dumps(everything), flush=True)
        out = given.out or (RESULTS / f"{name}.json" if given.model is None else None)
        write({"edits": given.edits, "summary": everything, "kinds": report}, out)


def write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
