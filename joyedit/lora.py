"""LoRA adapters for any of the networks: making, running, fusing, saving. What files hold is read in
`lora_files`.

An adapter adds strength * alpha / r * up @ down to a weight. The networks know nothing of it: reading
`.weight` of an adapted layer gives a weight with these factors beside it (`adapted.py`), while the parameter
itself, and with it `state_dict`, `to` and `save_pretrained`, stays the network's own. The factors are
multiplied as they are, so that what is small beside a weight in bf16 is not rounded away, and so that those
that are trained give in an edit what they gave in training. This costs two thin matrix products per layer.
`fuse_lora` stores the sum in the parameter instead, which costs nothing per step: the same in fp32 up to
rounding, and in bf16 without what the sum's rounding loses. Differences of whole weights, biases and norms
are always read as sums.

Source: arXiv 2106.09685; diffusers `loaders/lora_base.py`.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import numbers
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from joyedit.adapted import AdaptedWeight, Weighted, merge
from joyedit.checkpoints.lora_files import DENOISERS, WEIGHT_NAME, Changes, Delta, open_lora, read_lora
from joyedit.checkpoints.lora_spellings import (
    BlockWeights,
    Strength,
    as_given,
    packed_layers,
    packed_metadata,
    strength_at,
)
from joyedit.checkpoints.lora_writing import (
    layers_of_changes,
    provenance,
    spelled_lora,
    usual_layout,
    write_lora,
)
from joyedit.checkpoints.network import Network
from joyedit.checkpoints.summary import adapters
from joyedit.quantised import quantised_weights

log = logging.getLogger("joyedit")

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)  # those whose weights are read with factors beside them
STATE = "lora_adapters"  # the attribute of a network that holds its AdapterState

# `_RUNNING.scales`: what the running call multiplies adapters with, by AdapterState. Each thread has its own:
# calls in several threads share networks. (torch.compile reads and guards this; a ContextVar it does not.)
_RUNNING = threading.local()


@dataclasses.dataclass(frozen=True)
class LoraReport:
    """What became of a file. The tensors of `matched` and `lacking` are named network by network.

    matched: those that the adapter changes. unmatched: keys of the file that no network has. lacking: those
    of other blocks that are named like matched ones, and that the file has nothing for.
    """

    name: str
    matched: Mapping[str, tuple[str, ...]]
    unmatched: tuple[str, ...]
    lacking: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(
        cls,
        name: str,
        changes: Mapping[str, Changes],
        unmatched: Sequence[str],
        networks: Mapping[str, Network],
    ) -> "LoraReport":
        lacking = {}
        for network, found in changes.items():
            alike = {_without_numbers(tensor) for tensor in found}
            others = [tensor for tensor, _ in networks[network].named_parameters() if tensor not in found]
            lacking[network] = tuple(tensor for tensor in others if _without_numbers(tensor) in alike)
        matched = {network: tuple(found) for network, found in changes.items()}
        return cls(name, matched, tuple(unmatched), lacking)

    def __str__(self) -> str:
        counts = [f"{len(tensors)} tensors of {network}" for network, tensors in self.matched.items()]
        text = f"adapter {self.name!r} changes {', '.join(counts)}"
        if self.unmatched:
            text += f"; {len(self.unmatched)} keys of the file match nothing{_sample(self.unmatched)}"
        lacking = [f"{network}.{tensor}" for network, tensors in self.lacking.items() for tensor in tensors]
        return text + (f"; nothing for {len(lacking)} alike{_sample(lacking)}" if lacking else "")


def _without_numbers(tensor: str) -> str:
    return re.sub(r"\d+", "*", tensor)


def _sample(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"


class Adapters:
    """The adapters of some networks, together: what pipelines offer under the same names.

    All state is in the networks, so pipelines that share a network share its adapters.
    """

    def __init__(self, networks: Mapping[str, Network]):
        """`networks`: by the name that files use as prefix: "unet", "transformer", "text_encoder"."""
        self.networks = dict(networks)

    def __repr__(self) -> str:
        """An adapter a line: where it is, in use or not, and with which weight."""
        return adapters(self._states)

    def load_lora_weights(
        self,
        source: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> LoraReport:
        """Load an adapter from a file, a folder, a Hub repository, or a state dict; from then on it is the
        active one, with weight 1.

        adapter_name: default "default_0", "default_1", ... weight_name: which file of a folder or repository.
        options: revision, token, cache_dir, local_files_only, force_download, use_safetensors.
        Nothing is changed when it raises: FileNotFoundError, or ValueError for a name in use, a file in which
        nothing matches (saying what it looks like), factors of the wrong shape, a kind that is not supported.
        """
        states, taken = self._states, self._taken
        name = adapter_name or next(n for i in itertools.count() if (n := f"default_{i}") not in taken)
        self._refuse_taken("adapter_name", name)
        tensors, metadata, label = source, {}, "the state dict"
        if not isinstance(tensors, Mapping):
            tensors, metadata = open_lora(tensors, weight_name, subfolder or "", options)
            label = str(tensors)
        try:
            changes, unmatched = read_lora(tensors, metadata, self.networks)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
        report = LoraReport.of(name, changes, unmatched, self.networks)
        log.log(logging.WARNING if unmatched else logging.INFO, "%s: %s", label, report)
        for network, state in states.items():
            state.weights[name] = 1.0
            if network in changes:
                state.loaded[name] = changes[network]
            state.activate([name] if network in changes else [], self.networks[network])
        return report

    def add_lora(
        self,
        rank: int,
        alpha: float | None = None,
        targets: str = "attention",
        name: str = "default",
    ) -> dict[str, nn.Parameter]:
        """Give the denoiser an adapter that has no effect yet, to be trained; from now on it is the active
        one. Returns its factors, in fp32, which runs read as they are: `<network>.<layer>.lora_A.weight`
        (rank, inputs), drawn from the global generator, and `lora_B` (outputs, rank), zero.

        alpha: the strength is alpha / rank; None: 1. targets: the layers, "attention", "all" (every linear
        layer and convolution), or a regular expression that is found in their names. Raises ValueError, with
        nothing changed, for a rank or alpha that is not positive, targets that match nothing, a name in use.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank={rank!r}: must be a positive whole number")
        if alpha is not None and not (_is_number(alpha) and 0 < alpha < float("inf")):
            raise ValueError(f"alpha={alpha!r}: must be a positive number, or None for the rank")
        self._refuse_taken("name", name)
        trained = [network for network in self.networks if network in DENOISERS] or list(self.networks)
        layers = {network: layers_to_adapt(self.networks[network], targets) for network in trained}
        if not any(layers.values()):
            kinds = ", ".join(type(self.networks[network]).__name__ for network in trained)
            raise ValueError(f"targets={targets!r} matches no linear layer or convolution of {kinds}")
        factors: dict[str, nn.Parameter] = {}
        for network, state in self._states.items():
            state.weights[name] = 1.0
            if found := layers.get(network):
                state.loaded[name] = {}
                for layer in found:
                    weight = _parameter(self.networks[network], f"{layer}.weight")
                    down, up = new_factors(weight, rank)
                    state.loaded[name][f"{layer}.weight"] = [Delta(down, up, (alpha or rank) / rank)]
                    factors[f"{network}.{layer}.lora_A.weight"] = down
                    factors[f"{network}.{layer}.lora_B.weight"] = up
            state.activate([name] if found else [], self.networks[network])
        return factors

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Make these adapters the active ones.

        adapter_weights: one number for all, or one for each; in place of a number {"unet": 0.7,
        "text_encoder": 0}, where a network without an entry has 1; of a UNet in place of its number
        {"down": 0.5, "up": {"block_1": [0, 0.5, 1]}}, see `lora_spellings`. Raises
        ValueError for unknown names.
        """
        names = self._known([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        weights: Any = adapter_weights
        if isinstance(weights, (np.ndarray, Tensor)):
            weights = weights.tolist()
        weights = weights if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights has {len(weights)} values for {len(names)} adapters {names}")
        tables = [self._weight_table(weight) for weight in weights]
        for network, state in self._states.items():
            for name, table in zip(names, tables, strict=True):
                state.weights[name] = table[network]
            state.activate([name for name in names if name in state.loaded], self.networks[network])

    def get_active_adapters(self) -> list[str]:
        return list(dict.fromkeys(name for state in self._states.values() for name in state.active))

    @property
    def active_weights(self) -> dict[str, dict[str, Any]]:
        """The active adapters, each with its weight in each network, as `set_adapters` takes it."""
        return {
            name: {network: as_given(state.weights.get(name, 1.0)) for network, state in self._states.items()}
            for name in self.get_active_adapters()
        }

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The loaded adapters of each network that has any."""
        return {network: list(state.loaded) for network, state in self._states.items() if state.loaded}

    @property
    def fused_loras(self) -> set[str]:
        """The adapters that are in the weights now."""
        return {name for state in self._states.values() for name in state.fused}

    def enable_lora(self) -> None:
        self._set_enabled(True)

    def disable_lora(self) -> None:
        """Run without the adapters that are not fused, until `enable_lora`."""
        self._set_enabled(False)

    @contextlib.contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """All adapters that are not fused, times `scale` while the block runs, in this thread alone."""
        before = getattr(_RUNNING, "scales", {})
        _RUNNING.scales = {**before, **{state: state.scale * scale for state in self._states.values()}}
        try:
            yield
        finally:
            _RUNNING.scales = before

    def fuse_lora(
        self,
        lora_scale: float = 1.0,
        adapter_names: Sequence[str] | None = None,
        *,
        components: Sequence[str] | None = None,
        safe_fusing: bool = False,
        reversible: bool = True,
    ) -> None:
        """Add adapters (default: the active ones) to the weights, each times lora_scale and its own weight.

        reversible=True keeps the original tensors in main memory, as much again as the adapted weights; those
        that are mapped from a file cost nothing. safe_fusing=True raises ValueError, before anything is
        changed, when a weight would not be finite. ValueError also for names that are unknown or fused, and
        for adapters of weights that are quantised: a sum would have to be quantised anew.
        """
        components = self._components(components)
        names = self._known(adapter_names or self.get_active_adapters())
        if not names:
            raise ValueError("fuse_lora: no adapter is active: load one first, or give adapter_names")
        if again := [n for n in names if any(n in self._states[c].fused for c in components)]:
            raise ValueError(f"{again} are fused already: unfuse_lora() first")
        plans = {}
        for network in components:
            state = self._states[network]
            plans[network] = {n: lora_scale * state.weights[n] for n in names if n in state.loaded}
            refuse_quantised(network, self.networks[network], state.collect(plans[network]))
            if safe_fusing:
                state.check_finite(plans[network], self.networks[network])
        for network, plan in plans.items():
            self._states[network].fuse(plan, self.networks[network], reversible)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Put the original tensors back, bit for bit; the adapters are active again.

        Raises ValueError when they were not kept.
        """
        for network in self._components(components):
            self._states[network].check_reversible()
        for network in self._components(components):
            self._states[network].unfuse(self.networks[network])

    def unload_lora_weights(self) -> None:
        """Forget all adapters. Fused weights stay fused, as saving them needs: call `unfuse_lora` before this
        to have the originals back."""
        for network, state in self._states.items():
            if state.fused:
                log.info("%s keeps the fused adapters %s", network, sorted(state.fused))
            state.activate([], self.networks[network])
            del self.networks[network].__dict__[STATE]

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget some adapters. Raises ValueError for fused ones."""
        names = self._known([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        if fused := self.fused_loras & set(names):
            raise ValueError(f"{sorted(fused)} are fused: unfuse_lora() first")
        for network, state in self._states.items():
            for name in names:
                state.loaded.pop(name, None)
                state.weights.pop(name, None)
            state.activate([name for name in state.active if name not in names], self.networks[network])

    def save_lora_weights(
        self,
        save_directory: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        **layers: Any,
    ) -> Path:
        """Write one adapter under Diffusers' names (PEFT factors) with its strength multiplied into `up`, so
        that every reader gives it the same. Returns the file.

        adapter_name: default the only active one. unet_lora_layers=, text_encoder_lora_layers=,
        transformer_lora_layers=: save these factors (`<layer>.lora_A.weight`, ..., a state dict or a module)
        instead, as they are; unet_lora_adapter_metadata= and its like: the settings that go with them (r,
        lora_alpha, ...), for the file's header. Raises ValueError when there is nothing to save.
        """
        layers, metadata = divided(layers)
        state = packed_layers(layers, self.networks)
        if not layers:
            if metadata:
                raise ValueError(f"{sorted(metadata)} are the settings of layers, and there are no layers")
            (name,) = self._known([adapter_name or self._only_active()])
            for network, loaded in self._states.items():
                shapes = {name: p.shape for name, p in self.networks[network].named_parameters()}
                for tensor, deltas in loaded.loaded.get(name, {}).items():
                    keys = keys_to_save(tensor, deltas, loaded.loaded[name], shapes[tensor])
                    state.update({f"{network}.{key}": value for key, value in keys.items()})
        if not state:
            raise ValueError("save_lora_weights: there is nothing to save")
        return write_lora(
            Path(save_directory) / (weight_name or WEIGHT_NAME), state, packed_metadata(metadata)
        )

    def save_lora(
        self,
        path: str | Path,
        adapter_name: str | None = None,
        *,
        to: str | None = None,
        base: str = "",
        trigger: str = "",
        factors: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write one adapter to a safetensors file in names that other programs read, its factors as they are.

        adapter_name: default the only active one. to: "comfyui", "kohya" or "diffusers", see `lora_writing`;
        None: kohya's for Stable Diffusion, ComfyUI's for the others. base, trigger: for the header, the model
        it was trained on and the words that call it. factors: tensors by the names of `add_lora` that are
        written in place of the live ones. Returns the file. Raises ValueError for what is not there.
        """
        (name,) = self._known([adapter_name or self._only_active()])
        states = self._states
        changes = {network: state.loaded[name] for network, state in states.items() if name in state.loaded}
        layers = layers_of_changes(changes, self.networks)
        for key, tensor in (factors or {}).items():
            network, _, rest = key.partition(".")
            layer, _, end = rest.partition(".lora_")
            role = {"A.weight": "down", "B.weight": "up"}.get(end, "")
            if role not in layers.get((network, layer), {}):
                raise ValueError(f"factors: {key} is no factor of {name!r}")
            layers[network, layer][role] = tensor
        used = {network: self.networks[network] for network in changes}
        state, header = spelled_lora(layers, to or usual_layout(used), used)
        return write_lora(Path(path), state, {**provenance(used, base, trigger), **header})

    def _only_active(self) -> str:
        active = self.get_active_adapters()
        if len(active) != 1:
            raise ValueError(f"adapter_name: say which one to save, {active} are active")
        return active[0]

    @property
    def _states(self) -> dict[str, "AdapterState"]:
        return {
            name: network.__dict__.setdefault(STATE, AdapterState())
            for name, network in self.networks.items()
        }

    @property
    def _taken(self) -> set[str]:
        return {name for state in self._states.values() for name in state.loaded}

    def _refuse_taken(self, argument: str, name: str) -> None:
        if name in self._taken:
            raise ValueError(f"{argument}={name!r} is in use: choose another, or delete_adapters({name!r})")

    def _known(self, names: Iterable[str]) -> list[str]:
        names, known = list(dict.fromkeys(names)), self._taken
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no adapter is called {unknown}; loaded are {sorted(known)}")
        return names

    def _components(self, names: Sequence[str] | None) -> list[str]:
        if unknown := set(names or ()) - set(self.networks):
            raise ValueError(f"components={sorted(unknown)}: adapters go into {sorted(self.networks)}")
        return list(names or self.networks)

    def _weight_table(self, weight: Any) -> dict[str, Strength]:
        table = weight if isinstance(weight, Mapping) else dict.fromkeys(self.networks, weight)
        if unknown := set(table) - set(self.networks):
            raise ValueError(f"adapter_weights names {sorted(unknown)}; known are {sorted(self.networks)}")
        table = {network: self._read_blocks(network, number) for network, number in table.items()}
        for network, number in table.items():
            if number is not None and not isinstance(number, BlockWeights) and not _is_number(number):
                raise ValueError(f"adapter_weights: {number!r} for {network} is not a number")
        given = {network: number for network, number in table.items() if number is not None}
        return {network: _as_strength(given.get(network, 1.0)) for network in self.networks}

    def _read_blocks(self, network: str, weight: Any) -> Any:
        """A weight by block with what it means in the network; other weights as they are."""
        if not isinstance(weight, Mapping):
            return weight
        return BlockWeights.read(weight, (name for name, _ in self.networks[network].named_parameters()))

    def _set_enabled(self, enabled: bool) -> None:
        for network, state in self._states.items():
            state.enabled = enabled
            state.sync(self.networks[network])


def divided(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `save_lora_weights`: the layers, and the settings that go with them."""
    settings = {name for name in given if name.endswith("_lora_adapter_metadata")}
    return {n: v for n, v in given.items() if n not in settings}, {n: given[n] for n in settings}


def _as_strength(weight: Any) -> Strength:
    return weight if isinstance(weight, BlockWeights) else float(weight)


def _is_number(value: Any) -> bool:
    """Whether it is a real number, of Python, numpy or torch; True and False are none."""
    value = value.item() if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0 else value
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# Parts of a layer's name by which it belongs to an attention.
ATTENTION = r"(^|\.)(self_|cross_)?attn\d?\."


def layers_to_adapt(network: nn.Module, targets: str) -> list[str]:
    """The linear layers and convolutions that `targets` means, see `add_lora`. Raises ValueError for what is
    no regular expression."""
    expression = {"attention": ATTENTION, "all": ""}.get(targets, targets)
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"targets={targets!r}: must be attention, all, or a regular expression ({error})"
        ) from None
    names = (name for name, module in network.named_modules() if isinstance(module, LAYERS))
    return [name for name in names if pattern.search(name)]


def new_factors(weight: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """down (r, ...), uniform within 1 / sqrt(inputs), as PEFT draws it, and up (D_out, r, ...), zero."""
    inputs, ones = weight.shape[1:], (1,) * (weight.ndim - 2)
    bound = inputs.numel() ** -0.5
    down = torch.empty(rank, *inputs, device="cpu", dtype=torch.float32).uniform_(-bound, bound)
    up = torch.zeros(len(weight), rank, *ones, device=weight.device, dtype=torch.float32)
    return nn.Parameter(down.to(weight.device)), nn.Parameter(up)


class AdapterState:
    """The adapters of one network."""

    def __init__(self):
        self.loaded: dict[str, Changes] = {}
        self.weights: dict[str, Strength] = {}
        self.active: list[str] = []
        self.enabled = True
        self.fused: dict[str, Strength] = {}  # adapter -> the strength with which it is in the weights
        self.originals: dict[str, Tensor] = {}  # tensor -> what it was before the first fuse
        self.reversible = True
        self.adapted: set[str] = set()  # modules whose parameters are read with their deltas

    def activate(self, names: Sequence[str], network: nn.Module) -> None:
        self.active = list(names)
        self.sync(network)

    @property
    def scale(self) -> float:
        """Of the running call."""
        return getattr(_RUNNING, "scales", {}).get(self, 1.0)

    def sync(self, network: nn.Module) -> None:
        """Let the network's modules read the sums that are wanted now."""
        running = {n: self.weights[n] for n in self.active if self.enabled and n not in self.fused}
        live: dict[str, dict[str, Weighted]] = {}
        for tensor, deltas in self.collect(running).items():
            path, _, leaf = tensor.rpartition(".")
            live.setdefault(path, {})[leaf] = deltas
        for path in self.adapted | live.keys():
            read_with_deltas(network.get_submodule(path), live.get(path, {}), self)
        self.adapted = set(live)

    def collect(self, strengths: Mapping[str, Strength]) -> dict[str, Weighted]:
        """Tensor -> the deltas of these adapters."""
        found: dict[str, Weighted] = {}
        for name, strength in strengths.items():
            for tensor, deltas in self.loaded.get(name, {}).items():
                if here := strength_at(strength, tensor):
                    found.setdefault(tensor, []).extend((delta, here) for delta in deltas)
        return found

    @torch.no_grad()
    def check_finite(self, strengths: Mapping[str, Strength], network: nn.Module) -> None:
        for tensor, deltas in self.collect(strengths).items():
            if not merge(_parameter(network, tensor).data, deltas).isfinite().all():
                raise ValueError(f"{tensor} would not be finite with {sorted(strengths)}: nothing was fused")

    @torch.no_grad()
    def fuse(self, strengths: Mapping[str, Strength], network: nn.Module, reversible: bool) -> None:
        """Sums are made from the originals, so that the order of several calls does not round differently."""
        together = {**self.fused, **strengths} if reversible and self.reversible else dict(strengths)
        changed = self.collect(strengths)
        for tensor, deltas in self.collect(together).items():
            if tensor not in changed:
                continue
            parameter = _parameter(network, tensor)
            original = self.originals.get(tensor, parameter.data)
            if reversible and self.reversible:
                self.originals[tensor] = original.to("cpu")
                parameter.data = merge(original.to(parameter.device, parameter.dtype), deltas)
            else:
                parameter.data = merge(parameter.data, deltas)
        self.fused.update(strengths)
        if not reversible and strengths:
            self.reversible = False
            self.originals.clear()
        self.sync(network)

    def check_reversible(self) -> None:
        if self.fused and not self.reversible:
            raise ValueError(
                "fused with reversible=False: the original weights are gone, load the network again"
            )

    def unfuse(self, network: nn.Module) -> None:
        for tensor, original in self.originals.items():
            parameter = _parameter(network, tensor)
            parameter.data = original.to(parameter.device, parameter.dtype)
        self.originals.clear()
        self.fused.clear()
        self.sync(network)


def refuse_quantised(part: str, network: nn.Module, tensors: Iterable[str]) -> None:
    stored = quantised_weights(network)
    if found := [tensor for tensor in tensors if tensor in stored]:
        raise ValueError(
            f"fuse_lora: {found[0]} of the {part}, and {len(found) - 1} others, are stored as "
            f"{stored[found[0]].form}: adapters stay beside such weights, with the same result; to fuse "
            "them, load the weights in bf16"
        )


def _parameter(network: nn.Module, tensor: str) -> nn.Parameter:
    """The parameter itself, where reading the attribute would give a sum."""
    path, _, leaf = tensor.rpartition(".")
    parameter = network.get_submodule(path)._parameters[leaf]
    assert parameter is not None
    return parameter


def read_with_deltas(module: nn.Module, deltas: dict[str, Weighted], state: AdapterState) -> None:
    """From now on, reading these parameters as attributes of `module` gives them with the deltas, added or
    beside them, times the scale that `state` has for the running call.

    The class of this one object becomes a subclass in which the parameters are properties. `_parameters`, and
    so everything that walks over parameters, is untouched.
    """
    plain = getattr(type(module), "plain_class", type(module))
    if deltas:
        module.__dict__["lora_deltas"], module.__dict__["lora_state"] = deltas, state
        module.__class__ = _reading_class(plain, frozenset(deltas))
    else:
        for name in ("lora_deltas", "lora_state"):
            module.__dict__.pop(name, None)
        module.__class__ = plain


def running_deltas(module: nn.Module) -> dict[str, Weighted]:
    """What reading the parameters of a module adds to each of them in the running call."""
    if "lora_deltas" not in module.__dict__:
        return {}
    scale = module.__dict__["lora_state"].scale
    deltas = module.__dict__["lora_deltas"]
    return {leaf: [(delta, strength * scale) for delta, strength in deltas[leaf]] for leaf in deltas}


@functools.cache
def _reading_class(plain: type[nn.Module], leaves: frozenset[str]) -> type[nn.Module]:
    def reading(leaf: str) -> property:
        own: Any = getattr(plain, leaf, None)  # a quantised layer reads its weight by a property, too

        def read(module: nn.Module) -> Any:
            parameter = module._parameters[leaf] if own is None else own.fget(module)
            assert parameter is not None
            if not (scale := module.__dict__["lora_state"].scale):
                return parameter
            deltas = [(delta, strength * scale) for delta, strength in module.__dict__["lora_deltas"][leaf]]
            if not (leaf == "weight" and isinstance(module, LAYERS)):
                return merge(parameter, deltas)
            whole = [one for one in deltas if one[0].up is None]
            terms = [one for one in deltas if one[0].up is not None]
            base = merge(parameter, whole) if whole else parameter
            return AdaptedWeight(base, terms) if terms else base

        return property(read)

    def reduce(module: nn.Module, protocol: Any) -> tuple:
        """For pickle, which finds classes by name, and this one has none."""
        return _new_reading, (plain, leaves), dict(module.__dict__)

    made = {"plain_class": plain, "__reduce_ex__": reduce, **{leaf: reading(leaf) for leaf in leaves}}
    return type(plain.__name__, (plain,), made)


def _new_reading(plain: type[nn.Module], leaves: frozenset[str]) -> nn.Module:
    kind = _reading_class(plain, leaves)
    return kind.__new__(kind)


def keys_to_save(
    tensor: str, deltas: Sequence[Delta], changes: Changes, shape: Sequence[int]
) -> dict[str, Tensor]:
    """The PEFT keys of one tensor's deltas. A whole weight, or the bias of a layer without factors, has none:
    it is written as `diff`, which ComfyUI and `lora_files` read."""
    layer, _, leaf = tensor.rpartition(".")
    factored = any(delta.up is not None for delta in changes.get(f"{layer}.weight", ()))
    state = {}
    for delta in deltas:
        if delta.up is not None:
            ones = (1,) * (len(shape) - 2)
            state[f"{layer}.lora_A.weight"] = delta.down.reshape(-1, *shape[1:])
            state[f"{layer}.lora_B.weight"] = _times(delta.up, delta.scale).reshape(
                *delta.up.shape[:2], *ones
            )
        else:
            forms = {"weight": "diff", "bias": "lora_B.bias" if factored else "diff_b"}
            key = f"{layer}.{forms[leaf]}" if leaf in forms else f"{tensor}.diff"
            whole = _times(delta.down, delta.scale).reshape(shape)
            state[key] = state[key] + whole if key in state else whole
    return state


def _times(tensor: Tensor, scale: float) -> Tensor:
    """The product in the tensor's dtype where that is exact, else in fp32."""
    wide = tensor.float() * scale
    return wide.to(tensor.dtype) if torch.equal(wide.to(tensor.dtype).float(), wide) else wide
