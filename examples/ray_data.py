"""Many edits with Ray Data: each actor holds one pipeline, and Ray hands it the paths.

    pip install "ray[data]"
    python examples/ray_data.py photos "Make it winter." --out results --model MODEL --workers 8 --gpus 1

The names are those of `joyedit batch`, finished pictures are passed over, and a picture that fails is a row
with its message, not the end of the run. The folders must be ones that all nodes see.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import joyedit

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Editor:
    """What `map_batches` makes once in each actor, and calls with batches of paths."""

    def __init__(self, model: str, instruction: str, out: str, seed: int, steps: int | None = None):
        self.pipe = joyedit.load(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.out, self.seed = Path(out), seed
        self.call: dict[str, Any] = {"prompt": instruction}
        if steps is not None:
            self.call["num_inference_steps"] = steps

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
        """Columns "path", "output" and "error", which is empty where all went well."""
        rows = [self.edited(Path(str(path))) for path in batch["path"]]
        return {name: [row[name] for row in rows] for name in ("path", "output", "error")}

    def edited(self, path: Path) -> dict[str, str]:
        output, error = self.out / f"{path.stem}-edit-{self.seed}.png", ""
        if not output.exists():
            try:
                photo = joyedit.load_image(path)
                generator = torch.Generator("cpu").manual_seed(self.seed)
                image = self.pipe(image=photo, generator=generator, **self.call).images[0]
                joyedit.images.save_png(image, output, {**self.call, "seed": self.seed}, force=True)
            except (OSError, ValueError) as failure:
                error = str(failure)
        return {"path": str(path), "output": str(output), "error": error}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("instruction")
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", default="tiny-joyimage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workers", type=int, default=1, help="actors, each with a pipeline")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    given = parser.parse_args(arguments)

    import ray.data

    paths = sorted(path for path in given.folder.iterdir() if path.suffix.lower() in SUFFIXES)
    rows = ray.data.from_items([{"path": str(path.resolve())} for path in paths]).map_batches(
        Editor,
        fn_constructor_kwargs={
            "model": given.model,
            "instruction": given.instruction,
            "out": str(Path(given.out).resolve()),
            "seed": given.seed,
            "steps": given.steps,
        },
        batch_size=8,
        compute=ray.data.ActorPoolStrategy(size=given.workers),
        num_gpus=given.gpus,
    )
    failed = 0
    for row in rows.iter_rows():
        print(f"{row['path']}: {row['error']}" if row["error"] else row["output"], flush=True)
        failed += bool(row["error"])
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
