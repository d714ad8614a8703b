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
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

from joyedit.checkpoints.json_files import parse_json
from joyedit.checkpoints.plain_text import shown
from joyedit.checkpoints.replacing import PREFIX
from joyedit.command import places, spatial
from joyedit.command.arguments import blank, contradiction
from joyedit.command.batch_record import RECORD, is_of_batch
from joyedit.command.calls import origin_options
from joyedit.command.make import fill_from, refuse_foreign, system_named
from joyedit.command.parsing import PHOTO_SUFFIXES
from joyedit.command.photos import photo_name
from joyedit.command.recorded import REPEATED, fits, without
from joyedit.command.results import LONGEST_NAME, OUTPUT_SUFFIXES, shortened
from joyedit.command.rewrite import RECORDED
from joyedit.command.systems import SYSTEMS, System
from joyedit.media.download import url_scheme

if TYPE_CHECKING:
    from joyedit.pipelines.made_for import MadeFor

LONGEST_LINE = 2**20  # bytes
FILES = ("photo", "reference", "mask")
# What a result records of the pipeline, which is one for all lines, and the options that say it.
OF_ALL: Mapping[str, str] = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        *("model", "revision", "variant", "lora", "lora_scale", "fuse_lora", "dtype", "device"),
        *("prediction_type", "reference_quirks", "basesize", "preset"),
    )
} | {"parts": "--part"}
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
        return {"photographs": str(self.folder.resolve())}

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
        own, file = copy.copy(self.args), str(self.folder / self.names[job.place])
        # A file of this folder, whose name is no person's home.
        own.photos, own.seed = [os.path.abspath(file) if file.startswith("~") else file], job.seed
        return own

    def line_of(self, job: Job) -> None:
        return None


def pictures_in(folder: Path, out: Path) -> list[str]:
    """What is named like a picture there, relative to the folder and in order. Hidden files and folders are
    passed over, and results: `out`, and folders of other batches. A folder that is linked is looked into
    once, and not at all where it lies in this one anyway."""
    root = os.path.realpath(folder)
    seen = {root, os.path.realpath(out)}

    def fail(error: OSError) -> None:
        raise error

    def is_looked_into(path: str) -> bool:
        real = os.path.realpath(path)
        again = real in seen or (os.path.islink(path) and PurePath(real).is_relative_to(root))
        if again or os.path.lexists(os.path.join(path, RECORD)):
            return False
        seen.add(real)
        return True

    names = []
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [
            name for name in sorted(folders) if name[0] != "." and is_looked_into(os.path.join(place, name))
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
        taken = Taken()
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
                    if output is not None and (clash := taken.by_another(output, number)):
                        wrong.append(clash)
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
        where = f"line {self.line_of(job)}"
        fields = fields_of(line, where)
        if not self.reader.faults(fields):
            own, output = self.reader.told(fields)
            if output == job.output:
                return own
        raise ValueError(f"{where} of {self.path} has changed since it was looked at")

    def line_of(self, job: Job) -> int:
        return self.numbers[job.place]

    def checked(self, line: bytes, number: int) -> tuple[list[str], str | None]:
        """What is wrong with a line, and what its result is called, where it can be said."""
        try:
            fields = fields_of(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, "it")
        except ValueError as error:
            return [str(error)], None
        if self.reader is None:
            first = meant_by(fields, self.args)
            if wrong := without_model(first):
                return [wrong], None
            self.reader = Reader(self.path.parent, self.args, self.seed, first)
        if wrong := self.reader.faults(fields):
            return wrong, None
        try:
            return [], self.reader.told(fields)[1]
        except ValueError as error:
            return [str(error)], None


class Taken:
    """Names of results, and lines that have them. Where upper and lower case are one, or letters with accents
    may be spelt in two ways, such names are one file."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, str]] = {}
        self.folders: dict[str, int] = {}

    def by_another(self, output: str, number: int) -> str | None:
        """What is wrong with the name for that line, after those before it."""
        path = PurePosixPath(unicodedata.normalize("NFC", output).casefold())
        folders = [str(folder) for folder in path.parents[:-1]]
        before, name = self.files.setdefault(str(path), (number, output))
        said = f"output {shown(output, 80)}"
        if name != output:
            return f"{said} is that of line {before} but for the case of letters: each needs its own"
        if before != number:
            return f"{said} is that of line {before}: each needs its own"
        if str(path) in self.folders:
            return f"{said} is a folder in the output of line {self.folders[str(path)]}"
        for folder in folders:
            if folder in self.files:
                return f"{said} has the output of line {self.files[folder][0]} as a folder"
            self.folders.setdefault(folder, number)
        return None


def fields_of(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text in UTF-8: {error.reason}") from None
    fields = parse_json(text, where)
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is a {type(fields).__name__}, not a JSON object")
    return fields


def meant_by(fields: Mapping[str, Any], args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with those fields that tell which system is meant, whether they are sound or not."""
    first = copy.copy(args)
    for name in {name for system in SYSTEMS for name in system.texts} & {*fields}:
        setattr(first, name, str(fields[name]))
    first.photos = [""] if "photo" in fields else None
    if not args.references and wrong_reference(fields.get("reference")) is None:
        first.references = listed(fields["reference"])
    return first


def without_model(args: argparse.Namespace) -> str | None:
    """What is wrong where no model is named, and none ships for what is meant."""
    meant = next(system for system in SYSTEMS if system.is_meant(args))
    return None if args.model is not None or meant.model else meant.contradiction(args)


def wrong_reference(value: Any) -> str | None:
    files = listed(value)
    sound = bool(files) and all(isinstance(one, str) and one and "\0" not in one for one in files)
    return None if sound else f"reference is {shown(value, 40)}, not a path or a list of paths"


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class Reader:
    """From the fields of a line to the arguments of its edit. first: those of the first line, as far as they
    say which model is meant. folder: which the files that lines name are relative to."""

    def __init__(self, folder: Path, args: argparse.Namespace, seed: int, first: argparse.Namespace):
        from joyedit.loading.layouts import read_made_for

        self.folder, self.args, self.seed = folder, args, seed
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
        if name == "reference":
            return wrong_reference(value)
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
            own.references = [self.placed(one) for one in listed(fields["reference"])]
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
        return file if url_scheme(file) or file.startswith("~") else str(self.folder / file)


def wrong_output(value: Any) -> str | None:
    """What is wrong with the name of a result."""
    inside = "a path inside --out, as in dogs/red.png"
    if not isinstance(value, str) or not value or "\0" in value:
        return f"output is {shown(value, 40)}, not {inside}"
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or PureWindowsPath(value).drive or "\\" in value:
        return f"output {shown(value, 80)} leaves --out: it must be {inside}"
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        return f"output {shown(value, 80)} does not end in {', '.join(OUTPUT_SUFFIXES)}"
    if is_of_batch(path.parts[0]):
        return f"output {shown(value, 80)}: {RECORD} and errors-N.jsonl are files of the batch"
    if any(part.casefold().startswith(PREFIX) for part in path.parts):
        return f"output {shown(value, 80)}: names that begin with {PREFIX} are for what is not whole yet"
    try:
        longest = max(len(os.fsencode(part)) for part in path.parts)
    except UnicodeEncodeError:
        return f"output {shown(value, 80)} cannot be the name of a file"
    if longest > LONGEST_NAME:
        return f"output {shown(value, 40)} has a name of more than {LONGEST_NAME} bytes"
    return None
