"""What every training here does: continue after a kill, average the weights, write down what happened.

A `Run` owns a folder: `state.pt` (weights, their average, optimisers, random state, samples seen; replaced
as a whole every few minutes), `metrics.jsonl` (a line now and then), and what the trainers put beside them.
Start the same command again and it goes on where it stopped. All plans are in samples: processor time is also
recorded, wall time means little on a shared machine.
"""

import copy
import json
import math
import os
import signal
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm


class Run:
    """One training: what it has seen, and the averages of its weights.

    networks: by name; all their parameters are saved, those that require a gradient are averaged with
    `decay`. optimizers: all are saved. Loads what `folder` holds.
    """

    def __init__(
        self,
        folder: Path,
        networks: Mapping[str, nn.Module],
        optimizers: Iterable[torch.optim.Optimizer],
        decay: float,
        save_seconds: float = 240,
        log_steps: int = 50,
    ):
        self.folder = folder
        self.networks = dict(networks)
        self.optimizers = list(optimizers)
        self.decay = decay
        self.save_seconds, self.log_steps = save_seconds, log_steps
        self.samples = self.step = 0
        self._spent = 0.0  # processor seconds before this process
        self._losses: list[Mapping[str, float]] = []  # since the last line of the metrics
        self._stopped = False
        folder.mkdir(parents=True, exist_ok=True)
        self.average = {
            name: {key: value.detach().clone() for key, value in network.state_dict().items()}
            for name, network in self.networks.items()
        }
        if (folder / "state.pt").is_file():
            self._load()

    def until(self, samples: int, batch: int) -> Iterator[float]:
        """Steps until `samples` have been seen; gives the share of them that is done. Ends early, with
        everything saved, when the process is asked to stop (SystemExit)."""
        previous = signal.signal(signal.SIGTERM, self._stop)
        saved = time.monotonic()
        bar = tqdm(total=samples, initial=self.samples, desc=self.folder.name, mininterval=20)
        try:
            while self.samples < samples:
                yield self.samples / samples
                self.samples += batch
                self.step += 1
                bar.update(batch)
                if self._stopped or time.monotonic() - saved > self.save_seconds:
                    self.save()
                    saved = time.monotonic()
                if self._stopped:
                    raise SystemExit(f"stopped after {self.samples} samples; the same command goes on")
            self.save()
        finally:
            bar.close()
            signal.signal(signal.SIGTERM, previous)

    def update(self, losses: Mapping[str, float], clip: float | None = None) -> None:
        """One step of all optimisers on the gradients there are, and of the averages.

        losses: this step's, for the metrics. clip: the largest norm of all gradients together.
        """
        if clip is not None:
            parameters = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
            nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.decay, (1 + self.step) / (10 + self.step))  # early weights are soon forgotten
        with torch.no_grad():
            for name, network in self.networks.items():
                live = dict(network.named_parameters())
                trained = [key for key, parameter in live.items() if parameter.requires_grad]
                torch._foreach_lerp_(
                    [self.average[name][key] for key in trained], [live[key] for key in trained], 1 - decay
                )
        self._losses.append(losses)
        if (self.step + 1) % self.log_steps == 0:
            self.log(**{key: statistics.fmean(step[key] for step in self._losses) for key in losses})
            self._losses = []

    def log(self, **values: Any) -> None:
        """Append a line to the metrics."""
        line = {"samples": self.samples, "cpu_minutes": round(self.cpu_seconds / 60, 2)}
        line["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line.update({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()})
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @property
    def cpu_seconds(self) -> float:
        return self._spent + time.process_time()

    def set_rate(self, factor: float) -> None:
        """Learning rates as a share of those the optimisers were made with."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    def averaged(self, name: str) -> Any:
        """A copy of a network with the averaged weights."""
        network = copy.deepcopy(self.networks[name])
        network.load_state_dict(self.average[name])
        return network

    def save(self) -> None:
        state = {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": torch.get_rng_state(),
            "progress": (self.samples, self.step, self.cpu_seconds),
        }
        path = self.folder / "state.pt"
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def _load(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True, map_location="cpu")
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
            for key, value in self.average[name].items():
                value.copy_(state["average"][name][key])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        self.samples, self.step, spent = state["progress"]
        self._spent = spent - time.process_time()

    def _stop(self, *_: Any) -> None:
        self._stopped = True


def cosine(progress: float, end: float, start_at: float = 0.0) -> float:
    """1 until `start_at`, then half a cosine down to `end`."""
    t = min(max((progress - start_at) / (1 - start_at), 0), 1)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * t))


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised: every direction of a weight matrix learns equally fast.

    A step has the size of Adam's. Columns that never had a gradient (of a temporal kernel while pictures are
    trained) stay as they are. Source: Jordan et al., Muon, 2024; the scale is that of arXiv 2502.16982.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]).flatten(1)
                live = update.any(0)
                columns = orthogonalize(update[:, live])
                scale = 0.2 * math.sqrt(max(columns.shape, default=1))
                update[:, live] = columns
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """The matrix nearest to x (R, C) whose singular values are all about 1, by Newton-Schulz steps."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class RatedAdamW(torch.optim.AdamW):
    """AdamW in which parts of some parameters learn at a share of the rate.

    shares: parameter -> a tensor that broadcasts to it. (A smaller gradient would not do: Adam divides by
    it.)
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], shares: Mapping[nn.Parameter, Tensor], **options: Any
    ):
        super().__init__(parameters, fused=True, **options)
        self.shares = dict(shares)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        before = {p: p.clone() for p in self.shares}
        super().step(closure)
        for p, share in self.shares.items():
            p.copy_(torch.lerp(before[p], p, share.expand_as(p)))
