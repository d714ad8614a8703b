"""Train a small checkpoint: one command per model, which goes on where it stopped when given again.

    python -m benchmarks.shapes.train wan-vae --out runs/wan-vae
    python -m benchmarks.shapes.train joyimage --vae runs/wan-vae/vae --out runs/joyimage
    python -m benchmarks.shapes.train chronoedit --vae runs/wan-vae/vae --out runs/chronoedit
    python -m benchmarks.shapes.train sd-vae --out runs/sd-vae
    python -m benchmarks.shapes.train diffedit --vae runs/sd-vae/vae --out runs/diffedit
    python -m benchmarks.shapes.train diffedit --from runs/diffedit/checkpoint --out runs/diffedit-more

An editor trained `--from` a checkpoint begins with its weights and autoencoder, and reads varied wording.
Training runs in one process, on the processor (OMP_NUM_THREADS threads) or on `--device cuda`. Metrics are in
`metrics.jsonl` of the folder, the checkpoint is in its `checkpoint`, that of a VAE in its `vae`.
"""

import argparse
import importlib
from pathlib import Path

import torch

VAES = ("wan-vae", "sd-vae")
EDITORS = ("joyimage", "chronoedit", "diffedit")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes.train", description=__doc__)
    parser.add_argument("model", choices=VAES + EDITORS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--vae", type=Path, help="editors: the trained VAE, which must not change any more")
    parser.add_argument(
        "--from", type=Path, dest="start", help="editors: begin with the weights in this folder"
    )
    parser.add_argument("--stages", nargs="+", help="VAEs: only these, in this order")
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="such as cuda")
    given = parser.parse_args(arguments)
    train = importlib.import_module(f"benchmarks.shapes.{given.model.replace('-', '_')}").train
    if given.model in VAES:
        stages = {"stages": given.stages} if given.stages else {}
        train(given.out, scale=given.scale, seed=given.seed, device=given.device, **stages)
    elif given.vae is None and given.start is None:
        parser.error(f"{given.model} needs --vae or --from")
    else:
        vae = given.vae or given.start / "vae"
        train(given.out, vae, scale=given.scale, seed=given.seed, device=given.device, start=given.start)


if __name__ == "__main__":
    main()
