"""Training, from the settings of a run to what it leaves: read it from top to bottom.

    first pass     encoders, without the denoiser: latents and embeddings go to the cache
    second pass    the denoiser, without text encoders: steps
    now and then   validation at fixed noise, pictures beside those of the base model, the state

What a step draws (noise, levels, latents, which prompts are left out) depends on the seed, the step and the
sample's place in the batch alone. So a run that goes on repeats nothing and leaves nothing out, and the
number of processes or of accumulated parts does not change what is seen.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from joyedit.training.cache import Cache
from joyedit.training.devices import device_of
from joyedit.training.examples import Example, Order, form_of
from joyedit.training.first_pass import fill, kept_of
from joyedit.training.models import Trained, open_encoders, open_trained
from joyedit.training.pairs import FaultyPairs
from joyedit.training.pictures import Samples
from joyedit.training.plan import Plan, make_plan
from joyedit.training.run import Run, Stopping, rate_at
from joyedit.training.settings import Settings, settle
from joyedit.training.systems import Drawing, Kept, Said, Sample

log = logging.getLogger("joyedit")

VALID_SIGMAS = (0.9, 0.7, 0.5, 0.3, 0.1)
SAMPLED = 4  # pairs that pictures are made of
BETAS, WEIGHT_DECAY = (0.9, 0.99), 0.01
KEPT_BYTES = 2**30  # of the cache in memory


def train(settings: Settings, out: str | Path, disable_progress: bool | None = False) -> Path:
    """Train, or go on, in the folder `out`; returns what was made, `lora.safetensors` or `checkpoint`.

    Raises FaultyPairs for a set that cannot be trained on, ValueError for a run of other settings or another
    model, both before anything is read; OSError for a full disk, with the last state whole.
    """
    out = Path(out).expanduser()
    device = device_of(settings)

    # What is trained on: refused here, if anything is wrong with it.
    plan, faults = make_plan(settings, out / "cache")
    if faults:
        raise FaultyPairs(Path(settings.data), faults)
    settle(out, settings, plan.found)

    # First pass: what encoders make of it.
    cache = Cache(out / "cache")
    fill(
        cache,
        plan.examples + plan.valid,
        plan.system,
        lambda: open_encoders(settings, plan, device),
        disable_progress,
    )
    store = Store(cache)

    # The denoiser, what of it is trained, and where it was.
    torch.manual_seed(settings.seed)
    trained = open_trained(settings, plan, device)
    optimizer = torch.optim.AdamW(
        trained.parameters.values(), lr=settings.rate, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    run = Run(out, trained.parameters, optimizer, settings.ema)
    samples = Samples(out / "samples", plan, store, SAMPLED, settings.seed)
    how = Drawing.by(trained.pipe.scheduler, settings.sigma, settings.min_snr)
    order = Order([form_of({**kept, "prompt": said.words}) for kept, said in map(store, plan.examples)],
                  settings.batch, settings.seed)  # fmt: skip
    looked_at = run.resumed  # a state was saved after all else that its step is due

    bar = tqdm(total=settings.steps, initial=run.step, desc=out.name, disable=disable_progress)
    with Stopping() as stopping, bar, contextlib.ExitStack() as here:
        here.enter_context(trained.pipe.on_device(trained.network))
        while True:
            last = run.step >= settings.steps

            # Now and then, and after the last step: validate, make pictures, save.
            if not looked_at:
                with run.averaged(), torch.no_grad():
                    if plan.valid and due(run.step, settings.valid_every, last):
                        for sigma, loss in validate(plan, store, trained, how, settings.seed, device):
                            run.log(sigma=sigma, valid_loss=loss)
                    if due(run.step, settings.sample_every, last):
                        here.close()  # within a budget, the denoiser goes before the autoencoder comes
                        samples.make(run.step, trained.pipe)
                        here.enter_context(trained.pipe.on_device(trained.network))
                if run.step > 0 and (due(run.step, settings.save_every, last) or stopping.number is not None):
                    with run.averaged(), torch.no_grad():
                        trained.write(out)
                    run.save()  # last: who goes on from a state takes what is there for that of its step
            looked_at = False
            if last:
                break
            if stopping.number is not None:
                log.info("stopped after %d steps: the same command goes on", run.step)
                stopping.act()

            # One step, on `batch` samples: those of one form together, in parts that fit into memory.
            run.set_rate(
                rate_at(run.step, settings.steps, settings.rate, settings.lr_schedule, settings.warmup)
            )
            chosen = [plan.examples[i] for i in order[run.step]]
            drawn = [
                draw(plan, store(example), how, generator(settings.seed, run.step, place), settings.dropout)
                for place, example in enumerate(chosen)
            ]
            total = 0.0
            for part in parts(drawn, settings.batch // settings.accumulate):
                losses = plan.system.loss(trained.network, [sample.to(device) for sample in part], how)
                (losses.sum() / settings.batch).backward()
                total += losses.detach().sum().item() / settings.batch
            if not math.isfinite(total):
                names = ", ".join(example.pair.name for example in chosen)
                raise ValueError(
                    f"the loss of step {run.step + 1} is {total}, of the pairs {names}: lower the lr"
                )
            run.update(settings.clip)
            run.log(loss=total)
            bar.update()
    made = trained.place(out)
    if not made.exists():
        with run.averaged(), torch.no_grad():
            trained.write(out)
    return made


def due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def generator(*place: Any) -> torch.Generator:
    """One on the CPU, for what is drawn in one place of a training: a seed, a step, a sample."""
    digest = hashlib.sha256(" ".join(map(str, place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(
    plan: Plan, known: tuple[Kept, Said], how: Drawing, source: torch.Generator, dropout: float
) -> Sample:
    """A sample of an example; now and then without its prompt, so that guidance has something to subtract."""
    kept, said = known
    silent = torch.rand((), generator=source) < dropout
    return plan.system.draw(kept, said.blank if silent else said.words, how, source)


def parts(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Samples of one form together, at most `size` of them."""
    alike: dict[Any, list[Sample]] = {}
    for sample in samples:
        alike.setdefault(form_of({**sample.given, "latents": sample.latents}), []).append(sample)
    return [group[i : i + size] for group in alike.values() for i in range(0, len(group), size)]


def validate(
    plan: Plan, store: "Store", trained: Trained, how: Drawing, seed: int, device: torch.device
) -> list[tuple[float, float]]:
    """(sigma, mean loss) over the validation set, at the same noise every time."""
    found = []
    for sigma in VALID_SIGMAS:
        losses: list[Tensor] = []
        for i, example in enumerate(plan.valid):
            kept, said = store(example)
            sample = plan.system.draw(kept, said.words, how, generator("valid", seed, i), sigma)
            losses.append(plan.system.loss(trained.network, [sample.to(device)], how))
        found.append((sigma, torch.cat(losses).mean().item()))
    return found


class Store:
    """What the cache holds of examples; what was read stays in memory, up to a bound."""

    def __init__(self, cache: Cache):
        self.cache = cache
        self.kept: dict[Example, tuple[Kept, Said]] = {}
        self.nbytes = 0

    def __call__(self, example: Example) -> tuple[Kept, Said]:
        if example in self.kept:
            return self.kept[example]
        kept, said = known = kept_of(self.cache, example)
        nbytes = sum(tensor.nbytes for tensor in (*kept.values(), *said))
        if self.nbytes + nbytes <= KEPT_BYTES:
            self.kept[example] = known
            self.nbytes += nbytes
        return known
