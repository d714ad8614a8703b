"""Train a small checkpoint: one command per model, which goes on where it stopped when given again.

    python -m benchmarks.shapes.train wan-vae --out runs/wan-vae
    python -m benchmarks.shapes.train joyimage --vae runs/wan-vae/vae --out runs/joyimage

Training runs in one process on the processor's threads (OMP_NUM_THREADS). Metrics are in `metrics.jsonl`.
"""

import argparse
from pathlib import Path

from benchmarks.shapes import joyimage, wan_vae


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes.train", description=__doc__)
    parser.add_argument("model", choices=("wan-vae", "joyimage"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--vae", type=Path, help="joyimage: the trained VAE, which must not change any more")
    parser.add_argument("--stages", nargs="+", help="only these, in this order")
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of samples")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.model == "wan-vae":
        wan_vae.train(given.out, given.stages or ("pictures", "decoder"), given.scale, given.seed)
    elif given.vae is None:
        parser.error("joyimage needs --vae")
    else:
        joyimage.train(given.out, given.vae, given.scale, given.seed)


if __name__ == "__main__":
    main()
