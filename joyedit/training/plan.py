"""What a training will do, before any weight is read: the system, the examples, and all that is wrong.

Names, captions, pictures, and the configs of the model are read, so that a set that cannot be trained on is
refused at once, with every faulty pair by its name.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from joyedit.checkpoints.options import LoadOptions
from joyedit.estimates.estimating import index_of
from joyedit.estimates.parts import Part, open_parts
from joyedit.loading.layouts import Checkpoint, find_checkpoint
from joyedit.lora import layers_to_adapt
from joyedit.pipelines.made_for import MadeFor
from joyedit.training.cache import Hashes, revision_of
from joyedit.training.chronoedit import ChronoEdit
from joyedit.training.data import VALID, find_pairs, unreadable
from joyedit.training.examples import Example, plan_examples
from joyedit.training.joyimage import JoyImage
from joyedit.training.pairs import Fault, Pair
from joyedit.training.settings import Settings
from joyedit.training.stable_diffusion import StableDiffusion
from joyedit.training.systems import System

# The pipelines whose denoisers are trained.
SYSTEMS: Mapping[str, Callable[..., System]] = {
    "JoyImageEditPipeline": JoyImage,
    "JoyImageEditPlusPipeline": functools.partial(JoyImage, plus=True),
    "ChronoEditPipeline": ChronoEdit,
    "StableDiffusionDiffEditPipeline": StableDiffusion,
}
LOOKED_AT = "files.json"  # in the cache: the hashes of files


@dataclasses.dataclass(frozen=True)
class Plan:
    """checkpoint, parts: the model, its networks without memory. examples, valid: what is trained and
    validated on. found: what tells this training from others, in words."""

    checkpoint: Checkpoint
    parts: Mapping[str, Part]
    made_for: MadeFor
    system: System
    examples: list[Example]
    valid: list[Example]
    found: Mapping[str, str]


def make_plan(settings: Settings, cache: Path) -> tuple[Plan, list[Fault]]:
    """The plan of what can be trained on, and everything that is wrong with the set. Raises FileNotFoundError
    and ValueError for a model or a folder that are not there, or not of a kind that is trained."""
    checkpoint = find_model(settings)
    parts = open_parts(checkpoint, LoadOptions())
    index = index_of(checkpoint)
    made_for = MadeFor.from_index(index, checkpoint.origin.name)
    revisions = {name: revision_of(checkpoint, name) for name in parts}
    system = make_system(checkpoint.class_name, made_for, revisions, settings)
    network = parts[system.denoiser].network
    config = network.config
    refuse_unfit(settings, system, network)
    own = [(int(h), int(w)) for h, w in index.get("buckets") or []]
    tables = system.tables(settings.basesize, own, config, made_for)

    hashes = Hashes(cache / LOOKED_AT)
    folder = Path(settings.data).expanduser()
    places = {"": folder} | ({f"{VALID}/": folder / VALID} if (folder / VALID).is_dir() else {})
    faults: list[Fault] = []
    examples: dict[str, list[Example]] = {"": [], f"{VALID}/": []}
    for prefix, place in places.items():
        pairs, wrong = usable(place, system, hashes)
        made, narrow = plan_examples(pairs, tables, hashes, system.names)
        examples[prefix] = made
        faults += [Fault(prefix + fault.name, fault.reason) for fault in wrong + narrow]
    hashes.save()
    trained = examples[""]
    names = "\n".join(f"{example.pictures} {example.words}" for example in trained)
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    found = {
        "model": revisions[system.denoiser],
        "encoders": hashlib.sha256("".join(sorted(revisions.values())).encode()).hexdigest()[:16],
        "set": f"{len(trained)} examples, {digest}",
    }
    plan = Plan(checkpoint, parts, made_for, system, trained, examples[f"{VALID}/"], found)
    return plan, sorted(set(faults))


def find_model(settings: Settings) -> Checkpoint:
    options = {} if settings.revision is None else {"revision": settings.revision}
    checkpoint = find_checkpoint(settings.model, **options)
    if checkpoint.class_name not in SYSTEMS:
        raise ValueError(
            f"model={settings.model!r} holds a {checkpoint.class_name}, which is not trained here"
        )
    return checkpoint


def refuse_unfit(settings: Settings, system: System, network: Any) -> None:
    """Raises ValueError for settings that mean nothing to this system."""
    if not settings.full and not layers_to_adapt(network, settings.targets):
        kind = type(network).__name__
        raise ValueError(f"targets={settings.targets!r} matches no linear layer or convolution of {kind}")
    is_flow = not isinstance(system, StableDiffusion)
    if is_flow and settings.min_snr is not None:
        raise ValueError(
            f"min_snr={settings.min_snr:g}: weighs Stable Diffusion's loss, {settings.model!r} is none"
        )
    if not is_flow and settings.sigma != "shifted":
        raise ValueError(
            f"sigma={settings.sigma!r}: Stable Diffusion's noise levels are those of its timesteps"
        )


def make_system(
    class_name: str, made_for: MadeFor, revisions: Mapping[str, str], settings: Settings
) -> System:
    options: dict[str, Any] = {"frames": settings.frames} if class_name == "ChronoEditPipeline" else {}
    return SYSTEMS[class_name](made_for, revisions, **options)


def usable(folder: Path, system: System, hashes: Hashes) -> tuple[dict[str, Pair], list[Fault]]:
    """The pairs that the system takes, as it takes them, and what is wrong with the others. A file that was
    read before, and has not changed since, is not decoded again."""
    pairs, faults = find_pairs(folder)
    accepted: dict[str, Pair] = {}
    for name, pair in pairs.items():
        one = system.accept(pair)
        if isinstance(one, Fault):
            faults.append(one)
        else:
            accepted[name] = one
    broken = unreadable(list(accepted.values()), hashes)
    for fault in broken:
        accepted.pop(fault.name, None)
    return accepted, faults + broken
