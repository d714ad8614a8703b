"""Pairs by name: the target, its caption and its controls lie in folders, under one name.

    target/0001.png   target/0001.txt
    control/0001.jpg                       or control/0001_0.jpg, control/0001_1.jpg, ...
    mask/0001.png                          where there is one

These are the sets of ai-toolkit, musubi-tuner, diffusion-pipe and FlyMyAI, whose folders have several names;
further folders of controls (control_2 and so on) hold further references.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from joyedit.training.pairs import CLIPS, PICTURES, Fault, Pair

TARGETS = ("target", "targets", "images", "image", "edited")
CONTROLS = ("control", "controls", "source", "conditioning")
MASKS = ("mask", "masks")
NUMBERED = re.compile(r"(.+)_(\d+)")


def is_set(folder: Path) -> bool:
    return folder_of(folder, TARGETS) is not None


def read_folders(folder: Path) -> tuple[list[Pair], list[Fault]]:
    """The pairs that are whole, and what is wrong with the others. Without a folder of controls, pairs have
    none."""
    faults: list[Fault] = []
    place = folder_of(folder, TARGETS)
    assert place is not None
    targets = by_stem(place, PICTURES + CLIPS, faults)
    prompts = captions(place, targets, faults)
    controls = references(control_folders(folder), targets, faults)
    masks = {}
    if (mask_place := folder_of(folder, MASKS)) is not None:
        masks = by_stem(mask_place, PICTURES, faults)
        for stem in sorted(masks.keys() - targets.keys()):
            faults.append(Fault(stem, f"{shown(masks[stem])} has no picture in {place.name}/"))
    pairs = []
    for stem, target in targets.items():
        faulty = stem not in prompts
        if controls is not None and target.suffix.lower() not in CLIPS and not controls.get(stem):
            faults.append(Fault(stem, f"{shown(target)} has no control of that name"))
            faulty = True
        if not faulty:
            given = tuple((controls or {}).get(stem, ()))
            pairs.append(Pair(stem, target, prompts[stem], given, masks.get(stem)))
    return pairs, faults


def folder_of(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def control_folders(folder: Path) -> list[Path]:
    """The folder of controls, and those of further references, control_1, control_2, ..."""
    present = [place.name for place in folder.iterdir() if place.is_dir()]
    name = next((one for one in CONTROLS if any(re.fullmatch(rf"{one}(_?\d+)?", p) for p in present)), None)
    if name is None:
        return []
    numbered = {}
    for place in folder.iterdir():
        match = re.fullmatch(rf"{name}_?(\d+)", place.name)
        if match and place.is_dir():
            numbered[int(match[1])] = place
    first = [folder / name] if (folder / name).is_dir() else []
    return first + [numbered[number] for number in sorted(numbered)]


def by_stem(place: Path, suffixes: Sequence[str], faults: list[Fault]) -> dict[str, Path]:
    """Files with these suffixes by their names without them, in order. Two of one name are a fault."""
    found: dict[str, Path] = {}
    for path in sorted(place.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or path.is_dir():
            continue
        if path.stem in found:
            both = f"{shown(found[path.stem])} and {shown(path)}"
            faults.append(Fault(path.stem, f"{both} have one name"))
        found.setdefault(path.stem, path)
    return found


def captions(place: Path, targets: dict[str, Path], faults: list[Fault]) -> dict[str, str]:
    """What the .txt files say, of the targets that have one."""
    texts = by_stem(place, (".txt",), faults)
    for stem in texts.keys() - targets.keys():
        faults.append(Fault(stem, f"{shown(texts[stem])} has no picture beside it"))
    prompts = {}
    for stem, target in targets.items():
        if stem not in texts:
            faults.append(Fault(stem, f"{shown(target)} has no caption {stem}.txt beside it"))
            continue
        try:
            prompt = texts[stem].read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            faults.append(Fault(stem, f"{shown(texts[stem])} cannot be read: {reason}"))
            continue
        if not prompt:
            faults.append(Fault(stem, f"the caption {shown(texts[stem])} is empty"))
        else:
            prompts[stem] = prompt
    return prompts


def references(
    places: list[Path], targets: dict[str, Path], faults: list[Fault]
) -> dict[str, list[Path]] | None:
    """The controls of each target, in order; None where there is no folder of them."""
    if not places:
        return None
    found: dict[str, list[Path]] = {}
    for place in places:
        numbered: dict[str, dict[int, Path]] = {}
        for stem, path in by_stem(place, PICTURES, faults).items():
            match = NUMBERED.fullmatch(stem)
            if stem in targets:
                found.setdefault(stem, []).append(path)
            elif match and match[1] in targets:
                numbered.setdefault(match[1], {})[int(match[2])] = path
            else:
                faults.append(Fault(stem, f"{shown(path)} has no target of that name"))
        for stem, each in numbered.items():
            numbers = sorted(each)
            if any(path.parent == place for path in found.get(stem, ())):
                faults.append(Fault(stem, f"{place.name}/ holds both {stem} and {stem}_{numbers[0]}"))
            missing = sorted(set(range(min(numbers[0], 1), numbers[-1])) - set(numbers))
            if missing:
                names = ", ".join(f"{place.name}/{stem}_{number}" for number in missing)
                verb = "is" if len(missing) == 1 else "are"
                faults.append(Fault(stem, f"of its references {names} {verb} missing"))
            found.setdefault(stem, []).extend(each[number] for number in numbers)
    return found


def shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
