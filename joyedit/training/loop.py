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
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from joyedit.training.cache import Cache
from joyedit.training.devices import device_of
from joyedit.training.examples import Example, Order, form_of
from joyedit.training.first_pass import fill, kept_of
from joyedit.training.models import Trained, open_encoders, open_trained
from joyedit.training.optimisers import make_optimizer
from joyedit.training.pairs import FaultyPairs
from joyedit.training.pictures import Samples
from joyedit.training.plan import Plan, make_plan
from joyedit.training.processes import Processes, joined
from joyedit.training.run import Run, Stopping, rate_at
from joyedit.training.settings import Settings, settle
from joyedit.training.systems import Drawing, Kept, Said, Sample
from joyedit.training.turns import turns

VALID_SIGMAS = (0.9, 0.7, 0.5, 0.3, 0.1)
SAMPLED = 4  # pairs that pictures are made of
KEPT_BYTES = 2**30  # of the cache in memory


def train(settings: Settings, out: str | Path, disable_progress: bool | None = False) -> Path:
    """Train, or go on, in the folder `out`; returns what was made, `lora.safetensors` or `checkpoint`.

    Of several processes (torchrun) each computes its share of a batch. Raises FaultyPairs for a set that
    cannot be trained on, ValueError for a run of other settings or another model, both before anything is
    read; OSError for a full disk, with the last state whole; FailedElsewhere after another process.
    """
    device = device_of(settings.device)
    with joined(device) as processes:
        disable = disable_progress if processes.first else True
        return train_together(settings, Path(out).expanduser(), device, processes, disable)


def train_together(
    settings: Settings, out: Path, device: torch.device, processes: Processes, disable_progress: bool | None
) -> Path:
    """What each of the processes does."""
    check_share(settings, processes)

    # What is trained on: refused here, if anything is wrong with it.
    with processes.first_goes_ahead():
        plan, faults = make_plan(settings, out / "cache")
    if faults:
        raise FaultyPairs(Path(settings.data), faults)
    if processes.first:
        settle(out, settings, plan.found)

    # First pass: what encoders make of it.
    cache = Cache(out / "cache")
    fill(
        cache,
        plan.examples + plan.valid,
        plan.system,
        lambda: open_encoders(settings, plan, device),
        disable_progress,
        processes,
    )
    store = Store(cache)

    # The denoiser, what of it is trained, and where it was.
    torch.manual_seed(settings.seed)
    trained = open_trained(settings, plan, device, processes)
    optimizer = make_optimizer(settings.optimizer, list(trained.parameters.values()), settings.rate)
    run = Run(out, trained.parameters, optimizer, settings.ema, processes, trained.rows)
    samples = Samples(out / "samples", plan, store, SAMPLED, settings.seed, processes.first)
    how = Drawing.by(trained.pipe.scheduler, settings.sigma, settings.min_snr)
    order = Order([form_of({**kept, "prompt": said.words}) for kept, said in map(store, plan.examples)],
                  settings.batch, settings.seed)  # fmt: skip
    share = processes.share(settings.batch)

    with Stopping(processes) as stopping, contextlib.ExitStack() as here:
        here.enter_context(trained.pipe.on_device(trained.network))
        for turn in turns(run, settings.steps, stopping, disable_progress):
            # Now and then, and after the last step: validate, make pictures, save.
            if plan.valid and turn.due(settings.valid_every):
                with run.averaged(), trained.looked_at():
                    for sigma, loss in validate(plan, store, trained, how, settings.seed, device):
                        run.log(sigma=sigma, valid_loss=loss)
            if turn.due(settings.sample_every):
                here.close()  # within a budget, the denoiser goes before the autoencoder comes
                with run.averaged(), trained.looked_at():
                    samples.make(run.step, trained.pipe)
                here.enter_context(trained.pipe.on_device(trained.network))
            if turn.saves(settings.save_every):
                keep(run, trained, out)
            if turn.ends:
                break

            # One step, on `batch` samples: those of one form together, in parts that fit into memory.
            run.set_rate(
                rate_at(run.step, settings.steps, settings.rate, settings.lr_schedule, settings.warmup)
            )
            chosen = [plan.examples[i] for i in order[run.step]]
            drawn = [
                draw(plan, store(chosen[i]), how, generator(settings.seed, run.step, i), settings.dropout)
                for i in share
            ]
            total = 0.0
            for part, counts in processes.in_step(parts(drawn, len(share) // settings.accumulate)):
                losses = plan.system.loss(trained.network, [sample.to(device) for sample in part], how)
                (losses.sum() * counts / len(share)).backward()
                total += counts * losses.detach().sum().item() / settings.batch
            total = processes.total(total)
            if not math.isfinite(total):
                names = ", ".join(example.pair.name for example in chosen)
                raise ValueError(
                    f"the loss of step {run.step + 1} is {total}, of the pairs {names}: lower the lr"
                )
            trained.average_gradients()
            run.update(settings.clip)
            run.log(loss=total)
    made = trained.place(out)
    stale = run.resumed and trained.divided is not None  # of divided weights the state was saved first
    if processes.largest(stale or not made.exists()):  # as one: all write it, or none
        with run.averaged(), torch.no_grad():
            trained.write(out)
    return made


def keep(run: Run, trained: Trained, out: Path) -> None:
    """The state, and what is made of it. The state goes last: who goes on from it takes what is there for
    that of its step. Of divided weights it goes first, since they are written out of it."""
    if trained.divided is not None:
        run.save()
    with run.averaged(), torch.no_grad():
        trained.write(out)
    if trained.divided is None:
        run.save()


def check_share(settings: Settings, processes: Processes) -> None:
    """Raises ValueError for what several processes cannot do together."""
    if not processes.several:
        return
    if settings.batch % (processes.count * settings.accumulate):
        raise ValueError(
            f"batch={settings.batch}: must be a multiple of the {processes.count} processes"
            + f" times accumulate={settings.accumulate}" * (settings.accumulate > 1)
        )
    if settings.full and settings.optimizer == "muon":
        raise ValueError("optimizer='muon': a step is of a whole matrix, and several processes divide it")
    if settings.memory is not None:
        raise ValueError(f"memory={settings.memory!r}: several processes divide the weights among them")


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
        losses = torch.zeros(len(plan.valid), device=device)
        for i, counts in trained.processes.turns(len(plan.valid)):
            kept, said = store(plan.valid[i])
            sample = plan.system.draw(kept, said.words, how, generator("valid", seed, i), sigma)
            losses[i] += counts * plan.system.loss(trained.network, [sample.to(device)], how)[0]
        found.append((sigma, trained.processes.sum(losses).mean().item()))
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
