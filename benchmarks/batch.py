"""What a picture of `joyedit batch` costs, beside a plain loop that opens, edits and saves.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m benchmarks.batch [--pictures 100] [--rounds 5]

Both edit the same photographs of three shapes with `tiny-joyimage`, as many steps and the same seed, each in
a process of its own that opens the model, in turns. The loop is `joyedit.load`, `load_image`, a call and
`save` to PNG. Before anything is reported the pixels of both are compared. Time is that of the whole process:
what it had of processors (all threads), and by the clock.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.side_by_side import RESULTS, ROOT, UnequalResults, machine, rounded, write

SEED, INSTRUCTION = 7, "Make the red circle blue."
SHAPES = ((96, 72), (72, 96), (96, 96))  # width and height
MOST = 1.1  # of what the loop costs

LOOP = """
import sys
from pathlib import Path
import torch
import joyedit

photographs, results, steps, seed, instruction = sys.argv[1:]
pipe = joyedit.load("tiny-joyimage", device="cpu")
pipe.set_progress_bar_config(disable=True)
steps = {} if steps == "0" else {"num_inference_steps": int(steps)}
for path in sorted(Path(photographs).iterdir()):
    photo = joyedit.load_image(path)
    generator = torch.Generator("cpu").manual_seed(int(seed))
    image = pipe(image=photo, prompt=instruction, generator=generator, **steps).images[0]
    image.save(Path(results, f"{path.stem}-edit-{seed}.png"))
"""


def draw(folder: Path, count: int) -> None:
    """Red circles on grounds of noise."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        width, height = SHAPES[number % len(SHAPES)]
        pixels = generator.integers(90, 166, (height, width, 3), dtype=np.uint8)
        y, x = np.ogrid[:height, :width]
        across, down, radius = generator.integers(24, 48, 3)
        pixels[(x - across) ** 2 + (y - down) ** 2 < (radius // 2) ** 2] = (220, 30, 30)
        Image.fromarray(pixels).save(folder / f"{number:05}.png")


def spent(command: list[str]) -> tuple[float, float]:
    """Seconds of processors and by the clock that a command takes. Raises CalledProcessError."""
    before, start = os.times(), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return used, time.perf_counter() - start


def compare(loop: Path, batch: Path, count: int) -> None:
    """Raises UnequalResults unless both folders hold that many pictures of the same pixels."""
    names = sorted(path.name for path in loop.iterdir())
    if len(names) != count or names != sorted(path.name for path in batch.glob("*.png")):
        raise UnequalResults(f"{len(names)} pictures of {count}, or not those of the batch")
    for name in names:
        with Image.open(loop / name) as one, Image.open(batch / name) as other:
            if one.tobytes() != other.tobytes():
                raise UnequalResults(f"{name} differs")


def measure(pictures: int, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """Both sides in turns. Raises UnequalResults."""
    draw(folder / "photographs", pictures)
    times: dict[str, list[tuple[float, float]]] = {"loop": [], "batch": []}
    for number in range(rounds):
        loop, batch = folder / f"loop-{number}", folder / f"batch-{number}"
        loop.mkdir()
        own = [str(folder / "photographs"), str(loop), str(steps), str(SEED), INSTRUCTION]
        words = [str(folder / "photographs"), INSTRUCTION, "--out", str(batch), "--seed", str(SEED), "-q"]
        words += ["--device", "cpu", *(["--steps", str(steps)] if steps else [])]
        commands = {
            "loop": [sys.executable, "-c", LOOP, *own],
            "batch": [sys.executable, "-m", "joyedit", "batch", *words],
        }
        for name in sorted(commands, reverse=number % 2 == 0):
            times[name].append(spent(commands[name]))
        compare(loop, batch, pictures)
        print(f"round {number + 1}: {shares(times, number)}", flush=True)
    ratios = [[batch[i] / loop[i] for loop, batch in zip(*times.values(), strict=True)] for i in (0, 1)]
    processor, clock = map(statistics.median, ratios)
    return {
        "pictures": pictures,
        "steps": steps or "those of the model",
        "equal": "pixels of every picture",
        **{
            f"{kind}_seconds_per_picture_{name}": statistics.median(pair[i] for pair in pairs) / pictures
            for name, pairs in times.items()
            for i, kind in enumerate(("processor", "clock"))
        },
        "processor_ratio": processor,
        "clock_ratio": clock,
        "met": processor <= MOST,
        "rounds": times,
    }


def shares(times: dict[str, list[tuple[float, float]]], number: int) -> str:
    loop, batch = times["loop"][number], times["batch"][number]
    return (
        f"processor {batch[0]:.2f} / {loop[0]:.2f} s = {batch[0] / loop[0]:.3f}, "
        f"clock {batch[1]:.2f} / {loop[1]:.2f} s = {batch[1] / loop[1]:.3f}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch", description=__doc__)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="default: those that the model was made for")
    parser.add_argument("--out", type=Path, help="default: results/batch.json of a full run, else none")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = rounded(measure(given.pictures, given.rounds, given.steps, Path(folder)))
    ratio = f"a picture of the batch costs {report['processor_ratio']:.3f} of one of the loop"
    print(f"{ratio} in processor time, {report['clock_ratio']:.3f} by the clock")
    full = given.pictures >= 100 and given.rounds >= 5 and not given.steps
    if (path := given.out or (RESULTS / "batch.json" if full else None)) is not None:
        write(path, {"machine": machine(), **report})


if __name__ == "__main__":
    main()
