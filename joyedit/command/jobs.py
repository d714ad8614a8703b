"""What many edits are made of: the photographs of a folder, or the lines of a file.

Both know their number, the names of all results, and the arguments of each edit, as `joyedit edit` would have
them. Lines are JSON objects, and all are looked at before the first edit. What is kept of each is where it
begins and what its result is called, so that a million lines take little memory.
"""

import argparse
import copy
import difflib
import functools
import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from joyedit.checkpoints.json_files import parse_json
from joyedit.checkpoints.plain_text import shown
from joyedit.checkpoints.replacing import PREFIX
from joyedit.command import places, spatial
from joyedit.command.arguments import blank, contradiction
from joyedit.command.batch_record import RECORD
from joyedit.command.calls import origin_options
from joyedit.command.make import fill_from, refuse_foreign, system_named
from joyedit.command.parsing import PHOTO_SUFFIXES
from joyedit.command.photos import photo_name
from joyedit.command.recorded import REPEATED, fits, without
from joyedit.command.results import LONGEST_NAME, OUTPUT_SUFFIXES, shortened
from joyedit.command.rewrite import RECORDED
from joyedit.command.systems import SYSTEMS, System
from joyedit.media.download import is_url

if TYPE_CHECKING:
    from joyedit.pipelines.made_for import MadeFor

LONGEST_LINE = 2**20  # bytes
FILES = ("photo", "reference", "mask")
# What a result records of the pipeline, which is one for all lines, and the options that say it.
OF_ALL: Mapping[str, str] = {
    **{
        name: f"--{name.replace('_', '-')}" for name in ("model", "revision", "variant", "lora", "lora_scale")
    },
    **{name: f"--{name.replace('_', '-')}" for name in ("fuse_lora", "dtype", "device", "prediction_type")},
    **{name: f"--{name.replace('_', '-')}" for name in ("reference_quirks", "basesize", "preset")},
    "parts": "--part",
}
WORDS = {str: "a text", int: "a whole number", (int, float): "a number", bool: "true or false"}


class Job(NamedTuple):
    """One edit: where it stands among the photographs or lines, and its result, relative to the folder."""

    place: int
    output: str
    seed: int | None = None  # None: as the line says, or else that of the batch


class Faulty(ValueError):
    """What is wrong with what is to be done; nothing has been."""

    def __init__(self, faults: list[str]):
        super().__init__("; ".join(faults))
        self.faults = faults


class Photographs:
    """Those of a folder, and of the folders in it: each edited as `args` say, with each of the seeds.

    args: of the batch, filled from the checkpoint.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, seed: int, out: Path):
        self.folder, self.args = folder, args
        self.seeds = range(seed, seed + (args.num_images or 1))
        self.names = pictures_in(folder, out)
        if not self.names:
            raise Faulty([f"{folder} holds no picture ({', '.join(sorted(PHOTO_SUFFIXES))})"])
        self.stems = Counter(stem_of(name) for name in self.names)
        if twice := [name for name, count in Counter(self.outputs()).items() if count > 1]:
            raise Faulty([f"two results would be written to one file: {', '.join(twice[:4])}"])

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        """What tells this batch from one of other photographs."""
        return {"photographs": str(self.folder.resolve()).encode("utf-8", "backslashreplace").decode()}

    def outputs(self) -> Iterator[str]:
        return (job.output for job in self.jobs(range(len(self))))

    def jobs(self, places: range) -> Iterator[Job]:
        for place in places:
            for seed in self.seeds:
                yield Job(place, self.output_of(self.names[place], seed), seed)

    def output_of(self, name: str, seed: int) -> str:
        """Its own name, with the ending where another photograph has the same without."""
        path = PurePath(name)
        stem = path.stem if self.stems[stem_of(name)] == 1 else f"{path.stem}-{path.suffix[1:]}"
        return str(path.with_name(named(stem, f"-edit-{seed}.png")))

    def args_of(self, job: Job) -> argparse.Namespace:
        own = copy.copy(self.args)
        own.photos, own.seed = [str(self.folder / self.names[job.place])], job.seed
        return own

    def line_of(self, job: Job) -> None:
        return None


def pictures_in(folder: Path, out: Path) -> list[str]:
    """What is named like a picture there, relative to the folder and in order. Hidden files and folders are
    passed over, and results: `out`, and folders of other batches."""

    def fail(error: OSError) -> None:
        raise error

    def is_looked_into(path: str) -> bool:
        own = os.path.abspath(path) != os.path.abspath(out)
        return own and not os.path.lexists(os.path.join(path, RECORD))

    names = []
    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [
            name for name in folders if name[0] != "." and is_looked_into(os.path.join(place, name))
        ]
        pictures = [
            name for name in files if name[0] != "." and PurePath(name).suffix.lower() in PHOTO_SUFFIXES
        ]
        names += [os.path.relpath(os.path.join(place, name), folder) for name in pictures]
    return sorted(names)


def stem_of(name: str) -> str:
    return os.path.splitext(name)[0]


def named(stem: str, end: str) -> str:
    return f"{shortened(stem, LONGEST_NAME - len(end))}{end}"


class Lines:
    """Those of a file of JSON Lines. What a line does not say is as `args` say, those of the batch.

    Raises Faulty with all that is wrong in any line, OSError for a file that cannot be read, and as
    `system_named` for the model: that of `args`, or else the one that the first line means.
    """

    def __init__(self, path: Path, args: argparse.Namespace, seed: int):
        self.path, self.args, self.seed = path, args, seed
        self.starts, self.numbers = array("q"), array("q")
        self.names: list[str] = []
        self.reader: Reader | None = None
        faults: list[str] = []
        seen: dict[str, int] = {}
        digest = hashlib.sha256()
        with path.open("rb") as file:
            number, start = 0, 0
            while line := file.readline(LONGEST_LINE + 1):
                digest.update(line)
                number += 1
                if len(line) > LONGEST_LINE:
                    raise Faulty([*faults, f"line {number} has more than {LONGEST_LINE:,} bytes"])
                if line.strip():
                    wrong, output = self.checked(line, number)
                    if output is not None and (before := seen.setdefault(output, number)) != number:
                        wrong.append(
                            f"output {shown(output, 80)} is that of line {before}: each needs its own"
                        )
                    faults += [f"line {number}: {one}" for one in wrong]
                    self.starts.append(start)
                    self.numbers.append(number)
                    self.names.append(output or "")
                start += len(line)
        if not self.names:
            raise Faulty([f"{path} holds no line that says what to do"])
        if faults:
            raise Faulty(faults)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def facts(self) -> dict[str, str]:
        """What tells this batch from one of other lines."""
        return {"jobs": self.digest}

    @property
    def system(self) -> System:
        assert self.reader is not None
        return self.reader.system

    @property
    def made_for(self) -> "MadeFor":
        assert self.reader is not None
        return self.reader.made_for

    def outputs(self) -> Iterator[str]:
        return iter(self.names)

    def jobs(self, places: range) -> Iterator[Job]:
        return (Job(place, self.names[place]) for place in places)

    def args_of(self, job: Job) -> argparse.Namespace:
        """Raises ValueError for a line that has changed since it was looked at."""
        assert self.reader is not None
        with self.path.open("rb") as file:
            file.seek(self.starts[job.place])
            line = file.readline(LONGEST_LINE)
        own, _ = self.reader.told(fields_of(line, f"line {self.line_of(job)}"))
        return own

    def line_of(self, job: Job) -> int:
        return self.numbers[job.place]

    def checked(self, line: bytes, number: int) -> tuple[list[str], str | None]:
        """What is wrong with a line, and what its result is called, where it can be said."""
        try:
            fields = fields_of(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, "it")
        except ValueError as error:
            return [str(error)], None
        if self.reader is None:
            self.reader = Reader(self.path.parent, self.args, self.seed, fields)
        if wrong := self.reader.faults(fields):
            return wrong, None
        try:
            return [], self.reader.told(fields)[1]
        except ValueError as error:
            return [str(error)], None


def fields_of(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text in UTF-8: {error.reason}") from None
    fields = parse_json(text, where)
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is a {type(fields).__name__}, not a JSON object")
    return fields


class Reader:
    """From the fields of a line to the arguments of its edit. fields: of the first line, which says the model
    where nothing else does. folder: which the files that lines name are relative to."""

    def __init__(self, folder: Path, args: argparse.Namespace, seed: int, fields: Mapping[str, Any]):
        from joyedit.loading.layouts import read_made_for

        self.folder, self.args, self.seed = folder, args, seed
        texts = {name for system in SYSTEMS for name in system.texts}
        first = copy.copy(args)
        vars(first).update({name: value for name, value in fields.items() if name in texts})
        first.references = args.references or fields.get("reference")
        if wrong := contradiction(first):  # of references without a model
            raise ValueError(wrong)
        self.system = system_named(first)
        args.model = first.model
        self.made_for = read_made_for(args.model, **origin_options(args))
        of_result = without(REPEATED, (*OF_ALL, "mask"))
        own = without(dict(self.system.settings), (*OF_ALL, "references", "fps"))
        self.kinds = {**dict.fromkeys(self.system.texts, str), **of_result, **own}
        self.known = {"photo", "output", "reference", "mask", *self.kinds}
        others = {name for system in SYSTEMS for name in (*system.texts, *system.settings)}
        self.foreign = others - self.known - {"references", "fps"} - set(OF_ALL)
        self.readers: dict[str, Callable[[str], Any]] = {
            action.dest: action.type for action in args.parser._actions if action.type is not None
        }

    def faults(self, fields: Mapping[str, Any]) -> list[str]:
        """What is wrong with each field by itself."""
        return [wrong for name, value in fields.items() if (wrong := self.fault(name, value))]

    def fault(self, name: str, value: Any) -> str | None:
        if name in OF_ALL:
            return f"{name} is one for all lines: give {OF_ALL[name]}"
        if name in self.foreign:
            return f"{name} is not for {self.args.model}, which takes {', '.join(self.system.texts)}"
        if name not in self.known:
            match = difflib.get_close_matches(name, self.known, n=1)
            hint = f" (did you mean {match[0]}?)" if match else ""
            return f"{shown(name, 40)} is no field{hint}: there are {', '.join(sorted(self.known))}"
        if name == "output":
            return wrong_output(value)
        if name == "reference" and isinstance(value, list):
            sound = bool(value) and all(isinstance(one, str) and one for one in value)
            return None if sound else "reference is a path or a list of paths"
        if name in FILES:
            sound = isinstance(value, str) and bool(value) and "\0" not in value
            return None if sound else f"{name} is {shown(value, 40)}, not the path of a file"
        kind = self.kinds[name]
        if not fits(value, kind) or isinstance(value, dict):
            return f"{name} is {shown(value, 40)}, not {WORDS[kind]}"
        if not isinstance(value, (str, bool)) and name in self.readers:
            try:
                self.readers[name](repr(value))
            except argparse.ArgumentTypeError as error:
                return f"{name}: {error}"
        return None

    def told(self, fields: Mapping[str, Any]) -> tuple[argparse.Namespace, str]:
        """The arguments of a line without faults, and what its result is called. Raises ValueError where its
        fields do not go together, or with the options."""
        own = copy.copy(self.args)
        if "prompt" in fields:  # it is another edit than the options speak of
            vars(own).update(dict.fromkeys((*spatial.OPTIONS, *RECORDED)))
        elif any(name in fields for name in spatial.OPTIONS):
            own.prompt = None
        vars(own).update({name: fields[name] for name in self.kinds if name in fields})
        if "prompt" not in fields and (wrong := spatial.take_over(own) if own.prompt is None else None):
            raise ValueError(wrong)
        own.seed = fields.get("seed", self.seed)
        own.command = "edit" if "photo" in fields else "generate"
        own.photos = [self.placed(fields["photo"])] if "photo" in fields else None
        if "mask" in fields:
            own.mask = self.placed(fields["mask"])
        if "reference" in fields:
            several = fields["reference"]
            own.references = [
                self.placed(one) for one in ([several] if isinstance(several, str) else several)
            ]
        self.refuse(own)
        fill_from(self.made_for, own, self.system)
        if "output" in fields:
            return own, str(PurePosixPath(fields["output"]))
        stem = "generated" if own.photos is None else f"{PurePath(photo_name(own.photos[0])).stem}-edit"
        return own, named(stem, f"-{own.seed}.png")

    def refuse(self, own: argparse.Namespace) -> None:
        """Raises ValueError where the arguments of a line do not go together."""
        if wrong := blank(own):
            raise ValueError(wrong)
        for system in SYSTEMS:
            if wrong := system.misuse(own):
                raise ValueError(wrong)
        if wrong := places.misuse(own) or contradiction(own):
            raise ValueError(wrong)
        if (own.height is None) != (own.width is None):
            raise ValueError("height and width go together: give both, or neither")
        refuse_foreign(own, self.system)

    def placed(self, file: str) -> str:
        """A file that a line names, from here."""
        return file if is_url(file) or file.startswith("~") else str(self.folder / file)


def wrong_output(value: Any) -> str | None:
    """What is wrong with the name of a result."""
    inside = "a path inside --out, as in dogs/red.png"
    if not isinstance(value, str) or not value or "\0" in value:
        return f"output is {shown(value, 40)}, not {inside}"
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or PurePath(value).is_absolute() or "\\" in value:
        return f"output {shown(value, 80)} leaves --out: it must be {inside}"
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        return f"output {shown(value, 80)} does not end in {', '.join(OUTPUT_SUFFIXES)}"
    if any(part.startswith(PREFIX) for part in path.parts):
        return f"output {shown(value, 80)}: names that begin with {PREFIX} are for what is not whole yet"
    try:
        longest = max(len(os.fsencode(part)) for part in path.parts)
    except UnicodeEncodeError:
        return f"output {shown(value, 80)} cannot be the name of a file"
    if longest > LONGEST_NAME:
        return f"output {shown(value, 40)} has a name of more than {LONGEST_NAME} bytes"
    return None
