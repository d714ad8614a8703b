"""What memory a training takes, before anything is read: the loss and its gradient run on tensors without
memory, and are counted.

Counted is what is held at the same time where the denoiser trains: its weights and those of the autoencoder,
what is trained with the optimiser's moments, and all that a step makes on its way forward and back. What the
driver and Python take comes on top. The texts of prompts are not known here: they are taken to be two
sentences.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from joyedit import ops
from joyedit.estimates.counting import Counted
from joyedit.lora import Adapters
from joyedit.memory import tensors_of
from joyedit.schedulers.ddim import DDIMScheduler
from joyedit.training.examples import Example
from joyedit.training.models import BASES, base_of
from joyedit.training.plan import Plan
from joyedit.training.settings import Settings
from joyedit.training.systems import Drawing


@dataclasses.dataclass(frozen=True)
class Needed:
    """Bytes. encoders: the weights of the first pass. weights: those that wait or stay in the second.
    trained: parameters, moments and average, beside the weights. step: what a step makes, gradients among
    it."""

    encoders: int
    weights: int
    trained: int
    step: int

    @property
    def second_pass(self) -> int:
        return self.weights + self.trained + self.step


def memory_needed(settings: Settings, plan: Plan, device: torch.device) -> Needed:
    """For the largest example. Raises ValueError for a rank or targets that make no adapter. Changes the
    networks of the plan: it is not to be used afterwards."""
    system = plan.system
    part = plan.parts[system.denoiser]
    base = base_of(settings, device)
    part.network.to(BASES[base])
    network = (part.quantised() if base == "int8" else part).network
    if settings.full:
        parameters: dict[str, Any] = dict(network.requires_grad_(True).named_parameters())
    else:
        adapters = Adapters({system.denoiser: network})
        parameters = adapters.add_lora(settings.rank, settings.alpha, settings.targets)
    if settings.checkpointing:
        network.enable_gradient_checkpointing()
    count = sum(p.numel() for p in parameters.values())
    weights = sum(t.nbytes for t in tensors_of(network))
    vae = 4 * sum(p.numel() for p in plan.parts["vae"].network.parameters())
    encoders = sum(p.nbytes for name, p in plan.parts.items() if name not in (system.denoiser, "vae"))
    moments = (1 if settings.optimizer == "muon" else 2) + (settings.ema is not None) + (not settings.full)
    example = max(plan.examples, key=lambda one: tokens_of(plan, one))
    return Needed(
        encoders + vae, weights + vae, 4 * count * moments, step_of(settings, plan, network, example, device)
    )


def step_of(settings: Settings, plan: Plan, network: Any, example: Example, device: torch.device) -> int:
    """The most that the loss and its gradient take for a part of a batch."""
    kept, prompt = plan.system.stand_in(plan.parts, example)
    how = Drawing(scheduler=DDIMScheduler())
    source = torch.Generator().manual_seed(0)
    sample = plan.system.draw(kept, prompt, how, source).to(torch.device("meta"))
    samples = [sample] * (settings.batch // settings.accumulate)
    counted = Counted(tensors_of(network))
    kind = "cuda" if device.type != "cpu" else "cpu"
    with ops.standing_for(kind), counted:
        loss = plan.system.loss(network, samples, how).mean()
        backward(loss)
    return counted.tally.peak


def backward(loss: Tensor) -> None:
    """`loss.backward()`, by PyTorch's engine itself: that method switches off, until it returns, what stands
    for attention, and blocks that compute once more would find another one."""
    engine: Any = torch.autograd.Variable._execution_engine
    once = {"allow_unreachable": True, "accumulate_grad": True}
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), **once)


def tokens_of(plan: Plan, example: Example) -> int:
    """What grows with the memory of an example."""
    kept, prompt = plan.system.stand_in(plan.parts, example)
    return sum(tensor[0].numel() for name, tensor in kept.items() if name.endswith("_mean")) + len(prompt)
