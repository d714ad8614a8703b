"""Many edits with Ray Data: each actor holds one pipeline, and Ray hands it the paths.

    pip install "ray[data]"
    python examples/ray_data.py photos "Make it winter." --out results --model MODEL --workers 8 --gpus 1

Which pictures there are and what their results are called is as with `joyedit batch`. A folder of results of
another instruction, model, seed or number of steps is refused. Finished pictures are passed over, and a
picture that fails is a row with its message, not the end of the run. The folders must be ones that all nodes
see.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import joyedit
from joyedit.command.batch_record import claim, differences
from joyedit.command.jobs import Photographs


class Editor:
    """What `map_batches` makes once in each actor, and calls with batches of paths."""

    def __init__(self, model: str, instruction: str, seed: int, steps: int | None = None):
        self.pipe = joyedit.load(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.seed = seed
        self.call: dict[str, Any] = {"prompt": instruction}
        if steps is not None:
            self.call["num_inference_steps"] = steps

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
        """Columns "path", "output" and "error", which is empty where all went well."""
        paths, outputs = map(str, batch["path"]), map(str, batch["output"])
        rows = [self.edited(path, Path(output)) for path, output in zip(paths, outputs, strict=True)]
        return {name: [row[name] for row in rows] for name in ("path", "output", "error")}

    def edited(self, path: str, output: Path) -> dict[str, str]:
        error = ""
        if not output.exists():
            try:
                photo = joyedit.load_image(path)
                generator = torch.Generator("cpu").manual_seed(self.seed)
                image = self.pipe(image=photo, generator=generator, **self.call).images[0]
                output.parent.mkdir(parents=True, exist_ok=True)
                joyedit.images.save_png(image, output, {**self.call, "seed": self.seed}, force=True)
            except (OSError, ValueError) as failure:
                error = str(failure)
        return {"path": path, "output": str(output), "error": error}


def rows_of(folder: Path, out: Path, seed: int, settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each picture and where its result goes. Raises ValueError for a folder without any, and where `out`
    holds what was made with other settings."""
    work = Photographs(folder, argparse.Namespace(num_images=1), seed, out)
    facts = {"settings": {**settings, "made_by": "ray_data.py"}, **work.facts}
    if wrong := differences(claim(out, seed, facts), seed, facts):
        raise ValueError(f"{out} holds another batch ({'; '.join(wrong)}): name another folder with --out")
    return [
        {"path": str(folder / work.names[job.place]), "output": str(out / job.output)}
        for job in work.jobs(range(len(work)))
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("instruction")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny-joyimage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workers", type=int, default=1, help="actors, each with a pipeline")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    given = parser.parse_args(arguments)

    settings = {"model": given.model, "instruction": given.instruction, "steps": given.steps}
    try:
        found = rows_of(given.folder.resolve(), given.out.resolve(), given.seed, settings)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    import ray.data

    rows = ray.data.from_items(found).map_batches(
        Editor,
        fn_constructor_kwargs={**settings, "seed": given.seed},
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
