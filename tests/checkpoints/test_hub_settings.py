"""The Hub behind proxies and certificates that cannot be used, and a Hub that answers something else."""

import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import huggingface_hub
import pytest

from joyedit.checkpoints.hub import Origin

ROOT = Path(__file__).resolve().parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
SETTINGS = {
    "proxy of no known kind": {"HTTPS_PROXY": "socks9://me:secret@host:1"},
    "proxy of a kind that needs a package": {"HTTPS_PROXY": "socks5://me:secret@host:1"},
    "proxy without a port": {"HTTPS_PROXY": "http://me:secret@host:port"},
    "proxy of half an address": {"ALL_PROXY": "http://me:secret@[::1"},
    "missing certificates": {"SSL_CERT_FILE": "/nowhere/secret.pem"},
    "certificates that are none": {"SSL_CERT_FILE": __file__},
    "missing folder of keys": {"SSLKEYLOGFILE": "/nowhere/keys"},
}


def origins(tmp_path: Path, **settings: str) -> dict:
    """In a process with these settings: what comes of a cached model and of one that is not."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.lower().endswith("_proxy") and not key.startswith(("HF_", "SSL_", "TRANSFORMERS_"))
    }
    code = """
        import json, logging
        from joyedit.checkpoints.hub import Origin
        logging.basicConfig(format="%(message)s")
        try:
            Origin("org/never").listing()
        except OSError as error:
            missing = f"{type(error).__name__}: {error}"
        cached = Origin("org/model")
        root = cached.fetch(["transformer/config.json"])
        print(json.dumps({"missing": missing, "root": str(root), "commit": cached.commit}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**kept, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "NO_PROXY": "localhost", **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "log": done.stderr}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_cache_is_used_when_the_settings_cannot_be(name, tmp_path):
    kept = tmp_path / "hub" / "models--org--model"
    folder = kept / "snapshots" / SHA / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(SHA)

    # Nothing is sent: the client fails before, or no server is where the address points.
    found = origins(tmp_path, HF_ENDPOINT="https://127.0.0.1:9", **SETTINGS[name])
    setting = next(iter(SETTINGS[name]))
    assert found["missing"].startswith("ConnectionError: the Hub cannot be reached for org/never (")
    assert "check the connection and the settings" in found["missing"] and setting in found["missing"]
    assert (found["root"], found["commit"]) == (str(folder.parent), SHA)
    assert "the Hub cannot be reached for org/model" in found["log"]
    assert "using the files in the cache" in found["log"]
    assert "secret@" not in found["missing"] + found["log"]


class Portal(http.server.BaseHTTPRequestHandler):
    """What stands between a traveller and the web: it answers every question with its own page."""

    status, headers_sent = 200, {}

    def do_GET(self):
        self.send_response(self.status)
        for key, value in self.headers_sent.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(b"<html>Please log in</html>")

    def log_message(self, *arguments):
        pass


def test_a_page_instead_of_an_answer(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Portal) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        (tmp_path / "hub" / "models--org--model" / "snapshots" / SHA / "transformer").mkdir(parents=True)
        (tmp_path / "hub" / "models--org--model" / "refs").mkdir()
        (tmp_path / "hub" / "models--org--model" / "refs" / "main").write_text(SHA)
        config = tmp_path / "hub" / "models--org--model" / "snapshots" / SHA / "transformer" / "config.json"
        config.write_text("{}")
        found = origins(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", NO_PROXY="127.0.0.1")
        server.shutdown()
    assert found["missing"].startswith("ConnectionError: the Hub cannot be reached for org/never (")
    assert found["root"] == str(config.parent.parent)


@pytest.mark.parametrize(
    "error",
    [ConnectionError("\x1b]0;owned\x07 http://me:secret@host"), ValueError("\x1b[2J"), RuntimeError("\x9b")],
)
def test_what_the_client_says_is_made_visible(error, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(ConnectionError, match="the Hub cannot be reached for org/model") as caught:
        Origin("org/model", cache_dir=tmp_path).listing()
    said = str(caught.value)
    assert said.isprintable() and "secret" not in said and r"\x" in said


def test_a_wrong_name_is_no_matter_of_the_connection(tmp_path):
    with pytest.raises(ValueError, match="Repo id must|Cannot have") as caught:
        assert Origin("org/a--b", cache_dir=tmp_path).commit
    assert not isinstance(caught.value, OSError)


def test_an_unknown_user_in_a_path_is_a_missing_path():
    with pytest.raises(FileNotFoundError, match="~nobody_of_that_name"):
        Origin("~nobody_of_that_name/model").listing()
