"""A guided step of a network whose blocks come from their file against one of a network that has all of them
in memory, on a CPU, in pairs in one process. The file is in the cache of the system.

Both networks map the same file. With load on the machine the processor's time is the steadier figure: it has
in it what bringing the pages and giving them back takes.
"""

import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_weights import write_part
from benchmarks.side_by_side import machine
from joyedit.memory import stream_blocks, visit
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel

EDGE = 32  # of the latents of 256 x 256 pixels
PROMPTS = (112, 72)  # tokens of the positive and of the negative prompt with a picture
EXPECTED = 1.07  # streaming over resident


class NoRoom:
    """No block stays."""

    def begin(self) -> None:
        pass

    def left(self) -> int:
        return 0


@torch.no_grad()
def step(network: JoyImageEditTransformer3DModel, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = network.config.text_dim
    latents = torch.randn(1, 16, 1, EDGE, EDGE, generator=generator)
    texts = [torch.randn(1, n, width, generator=generator) for n in PROMPTS]
    tokens, grid = network.embed_image(latents), network.token_grid(latents)
    grid, vec = (2, *grid[1:]), network.embed_time(torch.tensor([500.0]))[0]
    embedded = [network.embed_text(text) for text in texts]
    return network.predict_branches(tokens, tokens, embedded, vec, network.rope(grid), grid)


def measure(folder: Path, layers: int, pairs: int, width: int = 1) -> dict[str, Any]:
    """width: what the released width is divided by. Raises RuntimeError where the two differ in a bit."""
    cls, base = JoyImageEditTransformer3DModel, JoyImageEditConfig()
    config = base.replace(
        num_layers=layers,
        hidden_size=base.hidden_size // width,
        num_attention_heads=base.num_attention_heads // width,
        text_dim=base.text_dim // width,
    )
    nbytes = write_part(folder, cls, config, torch.bfloat16, 0)
    resident, streamed = cls.from_pretrained(folder), cls.from_pretrained(folder)
    stream_blocks([streamed], torch.device("cpu"), NoRoom())
    rows = []
    with visit(streamed, None):
        for i in range(pairs + 1):
            row: dict[str, list[float]] = {}
            sides = {"resident": resident, "streamed": streamed}
            results = []
            for name in sorted(sides, reverse=i % 2 == 1):
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                wall, cpu = time.perf_counter(), time.process_time()
                results.append(step(sides[name], i))
                row[name] = [time.perf_counter() - wall, time.process_time() - cpu]
                row[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
            if not all(map(torch.equal, *results)):
                raise RuntimeError("streaming changes the result")
            rows.append(row)
            print(json.dumps(row), flush=True)
    rows = rows[1:]  # the first one fills the caches

    def ratio(which: int) -> float:
        return statistics.median(row["streamed"][which] / row["resident"][which] for row in rows)

    sides = {
        name: {
            "seconds": statistics.median(row[name][0] for row in rows),
            "processor_seconds": statistics.median(row[name][1] for row in rows),
            "page_faults": statistics.median(row[name][2] for row in rows),
        }
        for name in ("resident", "streamed")
    }
    return {
        "machine": machine(),
        "layers": layers,
        "bytes": nbytes,
        **sides,
        "ratio": ratio(0),
        "ratio_of_processor_seconds": ratio(1),
        "expected": EXPECTED,
        "pairs": [[row["resident"][0], row["streamed"][0]] for row in rows],
    }
