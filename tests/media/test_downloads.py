"""Photographs from servers that are slow, broken or hostile, and through broken settings."""

import contextlib
import http.client
import io
import logging
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import PIL.Image
import pytest

from joyedit.media import download as dl
from joyedit.media.images import load_image, load_photo

PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))
FILE = io.BytesIO()
PICTURE.save(FILE, "PNG")
PNG = FILE.getvalue()

OTHER_HOST = "127.0.0.2"  # loopback too; the tests below let it stand for the public internet


def answer(body: bytes = PNG, status: str = "200 OK", *headers: str, length: bool = True) -> bytes:
    size = [f"Content-Length: {len(body)}"] if length else []
    return "\r\n".join([f"HTTP/1.1 {status}", *size, *headers, "", ""]).encode("latin-1") + body


def redirect(location: str) -> bytes:
    return answer(b"", "302 Found", f"Location: {location}")


class Server:
    """Answers each connection with the bytes that `answers` gives for the requested path, then closes it.

    An iterable is sent piece by piece, until it ends or the test does; to a request that it does not know it
    says nothing. `requests` keeps what was asked.
    """

    def __init__(self, host: str, answers: dict[str, bytes | Callable[[], Iterable[bytes]]]):
        self.answers, self.requests, self.over = answers, [], threading.Event()
        self.socket = socket.create_server((host, 0))
        self.socket.settimeout(0.05)
        self.url = f"http://{host}:{self.socket.getsockname()[1]}"
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while not self.over.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self.socket.accept()
                threading.Thread(target=self.reply, args=(connection,), daemon=True).start()

    def reply(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            request = connection.recv(65536).decode("latin-1")
            self.requests.append(request)
            path = request.split(" ")[1].split("?")[0] if request.count(" ") > 1 else None
            given = self.answers.get(path)
            if given is None:
                self.over.wait(5)
                return
            for piece in [given] if isinstance(given, bytes) else given():
                if self.over.is_set():
                    return
                connection.sendall(piece)

    def close(self) -> None:
        self.over.set()
        self.thread.join(5)
        self.socket.close()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def serving() -> Iterator[Callable[..., Server]]:
    running = []

    def serve(answers, host="127.0.0.1"):
        running.append(Server(host, answers))
        return running[-1]

    yield serve
    for server in running:
        server.close()


@pytest.fixture
def public(monkeypatch):
    """OTHER_HOST counts as an address of the public internet."""
    private = dl.is_private
    monkeypatch.setattr(dl, "is_private", lambda address: address != OTHER_HOST and private(address))


def refused(url: str, **options) -> Exception:
    """The exception of a photograph that cannot be had: of a kind that callers know, naming the picture."""
    with pytest.raises((OSError, ValueError)) as caught:
        load_image(url, **options)
    assert type(caught.value) in (ValueError, ConnectionError, TimeoutError, FileNotFoundError)
    assert dl.shown_url(url) in str(caught.value) and str(caught.value).startswith("image '")
    return caught.value


def drip(start: bytes, piece: bytes = b"x") -> Callable[[], Iterable[bytes]]:
    """Bytes for five seconds: `start`, then one piece about every hundredth of a second."""

    def pieces():
        yield start
        for _ in range(500):
            time.sleep(0.01)
            yield piece

    return pieces


SLOW = {
    "/nothing": drip(b"", b""),
    "/status": drip(b"HTTP/1.1 200 O", b"K"),
    "/header": drip(b"HTTP/1.1 200 OK\r\nX-Slow: "),
    "/headers": drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "/continue": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "/body": drip(answer(PNG, "200 OK", "Content-Length: 100000", length=False)),
    "/chunk size": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "/chunks": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "/trailer": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n"),
}


@pytest.mark.parametrize("path", SLOW)
def test_the_deadline_holds_for_every_part_of_an_answer(path, serving):
    server = serving({path.replace(" ", "%20"): SLOW[path]})
    start = time.monotonic()
    error = refused(server.url + path, timeout=0.4)
    # More than 100 headers are refused before the deadline.
    assert isinstance(error, TimeoutError) or path == "/headers", error
    assert time.monotonic() - start < 3


def test_the_deadline_holds_over_redirects_together(serving):
    def slowly():
        time.sleep(0.25)
        yield redirect("/again")

    server = serving({"/again": slowly})
    start = time.monotonic()
    assert isinstance(refused(f"{server.url}/again", timeout=0.6), TimeoutError)
    assert time.monotonic() - start < 2 and 1 < len(server.requests) < 5


def test_the_deadline_holds_for_looking_up_the_name(monkeypatch):
    waiting = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: waiting.wait(10) and [])
    start = time.monotonic()
    assert isinstance(refused("http://slow.example/a.png", timeout=0.3), TimeoutError)
    waiting.set()
    assert time.monotonic() - start < 3


def test_the_deadline_holds_for_encryption(serving):
    url = serving({}).url.replace("http:", "https:") + "/a.png"  # the server knows no TLS, and is silent
    start = time.monotonic()
    assert isinstance(refused(url, timeout=0.4), TimeoutError)
    assert time.monotonic() - start < 3


BROKEN = {
    "length in words": (answer(PNG, "200 OK", "Content-Length: abc", length=False), "Content-Length: abc"),
    "negative length": (answer(PNG, "200 OK", "Content-Length: -1", length=False), "Content-Length: -1"),
    "two lengths": (answer(PNG, "200 OK", "Content-Length: 3"), "Content-Length: "),
    "length of 5,000 digits": (
        answer(PNG, "200 OK", f"Content-Length: {'9' * 5000}", length=False),
        "larger than max_bytes",
    ),
    "superscript length": (answer(PNG, "200 OK", "Content-Length: 1²", length=False), "Content-Length: 1²"),
    "no status": (b"hello\r\n\r\n", "could not be fetched"),
    "nothing": (b"", "could not be fetched"),
    "status of another kind": (b"HTTP/1.1 abc OK\r\n\r\n", "could not be fetched"),
    "escape sequences": (
        answer(b"", "500 \x1b[2J\x1b]0;owned\x07No\x9b31m"),
        r"answered 500 \x1b[2J\x1b]0;owned\x07No\x9b31m",
    ),
    "escapes in the length": (
        answer(PNG, "200 OK", "Content-Length: \x1b[31m", length=False),
        r"Content-Length: \x1b[31m",
    ),
    "headers without end": (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "could not be fetched"),
    "a long header": (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n", "could not be fetched"),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\n\r\n", "answered 304 Not Modified"),
    "no redirect": (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "answered 302 Found"),
    "cut off": (
        answer(PNG[:-9], "200 OK", f"Content-Length: {len(PNG)}", length=False),
        "9 bytes are missing",
    ),
} | {
    f"chunk of size {size.decode()!r}": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + size
        + b"\r\n"
        + PNG[:-20]
        + b"\r\n0\r\n\r\n",
        "",
    )
    for size in (
        b"",
        b"xyz",
        b"-5",
        b"-1",
        b"0x",
        b"f" * 30,
        b"1 1",
        b"\xff".decode("latin-1").encode(),
        b"9" * 5000,
    )
}


@pytest.mark.parametrize("name", BROKEN, ids=lambda name: name[:30])
def test_broken_answers_name_the_picture(name, serving):
    content, said = BROKEN[name]
    error = refused(serving({"/a.png": content}).url + "/a.png", timeout=5)
    assert said in str(error) and not re.search(r"[\x00-\x1f\x7f-\x9f]", str(error)), error
    assert not isinstance(error, TimeoutError)


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/a.png",
        "http://[zz]/a.png",
        "http://::1]/a.png",
        "http://" + "a" * 64 + ".example/a.png",
        "http://a..example/a.png",
        "http:///a.png",
        "http://",
        "http://user@/a.png",
        "http://host:99999/a.png",
        "http://host:port/a.png",
        "http://ho st/a.png",
        "http://ho\x00st/a.png",
        "http://ho℀st/a.png",
        "https://%0d%0aHost: x/a.png",
        "HTTPS://[fe80::1%25eth0/a.png",
    ],
)
def test_malformed_urls_name_the_picture(url):
    for read in (load_image, load_photo):
        with pytest.raises(
            ValueError, match="^image 'https?://.* is no valid URL: its (host|port)"
        ) as caught:
            read(url.lower())
        assert not re.search(r"[\x00-\x1f]", str(caught.value))


@pytest.mark.parametrize("scheme", ["http", "HTTP", "Http", "hTTp"])
def test_the_scheme_may_be_in_any_case(scheme, serving):
    url = serving({"/a.png": answer()}).url.replace("http", scheme)
    assert load_image(f"{url}/a.png").tobytes() == PICTURE.tobytes()
    assert load_photo(f"{url}/a.png")[0].tobytes() == PICTURE.tobytes()
    assert dl.is_url(url) and dl.is_url(url.replace("://", "s://")) and not dl.is_url(f"./{url}")


@pytest.mark.parametrize(
    "url", ["ftp://me:secret@host/a.png?key=1", "file:///a.png", "FTP://me:secret@host/a"]
)
def test_other_schemes_are_refused(url):
    with pytest.raises(ValueError, match="only http and https are read, not (ftp|file)") as caught:
        load_image(url)
    assert "secret" not in str(caught.value) and "key" not in str(caught.value)


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "data:image/png;base64,AAAA", "gopher://127.0.0.1:70/x"]
    + [
        "javascript:alert(1)",
        "FILE:///etc/passwd",
        "//[::1/a.png",
        "http://\x1b[31m/a.png",
        "http://host:x/a",
    ],
)
def test_redirects_lead_to_http_only(location, serving):
    error = refused(serving({"/a.png": redirect(location)}).url + "/a.png")
    assert isinstance(error, ConnectionError) and "was redirected to" in str(error)
    assert "only http and https" in str(error) or "no valid URL" in str(error)
    assert "\x1b" not in str(error)


def test_redirects_are_followed_and_counted(serving):
    steps = {f"/{i}": redirect(f"/{i + 1}") for i in range(10)}
    server = serving({**steps, "/10": answer(), "/round": redirect("round"), "/café": answer()})
    assert load_image(f"{server.url}/0").tobytes() == PICTURE.tobytes()
    assert "more than 10 redirects" in str(refused(f"{server.url}/round"))
    assert len(server.requests) == 22
    # Bytes that are not ASCII stay the bytes that they are, as those of a latin-1 header.
    server.answers.update({"/raw": redirect("/caf\xc3\xa9"), "/caf%C3%A9": answer()})
    assert load_image(f"{server.url}/raw").size == (9, 6)
    assert load_image(f"{server.url}/café").size == (9, 6)


def test_redirects_into_a_private_network_start_there(serving, public):
    inside = serving({"/secret": answer(), "/out": redirect("")})
    outside = serving({"/in": redirect(f"{inside.url}/secret"), "/a.png": answer()}, OTHER_HOST)
    error = refused(f"{outside.url}/in")
    assert isinstance(error, ConnectionError) and "127.0.0.1, which is in a private network" in str(error)
    assert inside.requests == []
    # The user's own URL may be private, and so may what it leads to; a public one in between ends that not.
    inside.answers["/out"] = redirect(f"{outside.url}/in")
    assert load_image(f"{inside.url}/out").size == (9, 6)
    assert load_image(f"{outside.url}/a.png").size == (9, 6)


@pytest.mark.parametrize(
    "host",
    ["localhost", "2130706433", "0x7f.1", "127.1", "0", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254"],
)
def test_private_addresses_in_any_spelling(host, serving, public):
    outside = serving({"/in": redirect(f"http://{host}:1/secret")}, OTHER_HOST)
    assert "in a private network" in str(refused(f"{outside.url}/in", timeout=5))


def test_every_address_of_a_name_is_checked_once_and_then_used(serving, public, monkeypatch):
    """A name with a private address among others, and one that changes its address after the check."""
    inside = serving({"/a.png": answer()})
    outside = serving({}, OTHER_HOST)
    asked, real = [], socket.getaddrinfo
    names = {"mixed.example": [[OTHER_HOST, "127.0.0.1"]], "turning.example": [[OTHER_HOST], ["127.0.0.1"]]}

    def look_up(host, port, *args, **options):
        if host not in names:
            return real(host, port, *args, **options)
        asked.append(host)
        answers = names[host][min(asked.count(host), len(names[host])) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    outside.answers.update(
        {
            "/mixed": redirect(f"http://mixed.example:{inside.port}/a.png"),
            "/turning": redirect(f"http://turning.example:{outside.port}/a.png"),
            "/a.png": answer(),
        }
    )
    assert "mixed.example, which is in a private network" in str(refused(f"{outside.url}/mixed"))
    assert load_image(f"{outside.url}/turning").size == (9, 6)
    assert asked == ["mixed.example", "turning.example"] and inside.requests == []
    assert f"Host: turning.example:{outside.port}\r\n" in outside.requests[-1]


def test_which_addresses_are_private():
    private = (
        "127.0.0.1 127.8.9.1 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1 "
        "0.0.0.0 255.255.255.255 224.0.0.1 240.0.0.1 ::1 :: fe80::1 fe80::1%eth0 fc00::1 fd12::1 ff02::1 "
        "::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b::a00:1 2002:7f00:1:: 2002:c0a8:101::"
    )
    open_to_all = (
        "1.1.1.1 8.8.8.8 172.32.0.1 192.167.1.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 "
        "2002:808:808::"
    )
    assert [address for address in private.split() if not dl.is_private(address)] == []
    assert [address for address in open_to_all.split() if dl.is_private(address)] == []


SECRETS = {
    "http://me:secret@{host}/a.png": "http://{host}/a.png",
    "http://me:se%40cret@{host}/a.png?token=secret#secret": "http://{host}/a.png",
    "http://secret@{host}/a.png?a=b@c": "http://{host}/a.png",
    "http://me:a/secret@{host}/a.png": "http://{host}/a.png",
    "http://me:a?secret@{host}/a.png": "http://{host}/a.png",
    "http://me:a#secret@{host}/a.png": "http://{host}/a.png",
    "http://me:se@cret@{host}/a.png": "http://{host}/a.png",
    "http://{host}/@me/a.png": "http://{host}/@me/a.png",
    "http://[::1]:80/@me/a.png?secret": "http://[::1]:80/@me/a.png",
    "http://{host}": "http://{host}",
}


@pytest.mark.parametrize("host", ["host.example", "host.example:8080", "127.0.0.1:1"])
@pytest.mark.parametrize("url", SECRETS)
def test_passwords_and_queries_are_not_shown(url, host):
    assert dl.shown_url(url.replace("{host}", host)) == SECRETS[url].replace("{host}", host)


def test_a_password_is_used_and_never_told(serving, caplog):
    caplog.set_level(logging.DEBUG)
    page = answer(b"<html>", "200 OK")
    answers = {"/a.png": answer(), "/page": page, "/gone": answer(b"", "404 No"), "/cut": page[:-3]}
    server = serving(
        {**answers, "/moved": redirect("/a.png"), "/away": redirect("http://a:secret@[x/?secret")}
    )
    there = server.url.replace("http://", "http://me:sec%20ret@")
    assert load_image(f"{there}/a.png").size == (9, 6)
    assert "Authorization: Basic bWU6c2VjIHJldA==\r\n" in server.requests[0]  # me:sec ret
    assert load_image(f"{there}/moved?key=secret").size == (9, 6)
    assert "GET /moved?key=secret HTTP/1.1" in server.requests[1]
    assert "Authorization: Basic bWU6c2VjIHJldA==\r\n" in server.requests[2]
    for path in ("/page", "/gone", "/cut", "/away"):
        error = refused(f"{there}{path}?key=secret")
        assert "sec" not in str(error) and "key" not in str(error), error
    for wrong in (
        "http://me:sec/ret@[::1/a.png",
        "http://me:sec@ho\u2100st/",
        "http://me:secret/x@host/a.png",
    ):
        assert "sec" not in str(refused(wrong))
    assert "sec" not in caplog.text


def test_a_password_stays_with_its_server(serving):
    other = serving({"/a.png": answer()})
    first = serving({"/a.png": redirect(f"{other.url}/a.png")})
    load_image(first.url.replace("http://", "http://me:secret@") + "/a.png")
    assert "Authorization" in first.requests[0] and "Authorization" not in other.requests[0]


BROKEN_PROXIES = [
    "socks5://me:secret@host:1",
    "http://[::1",
    "http://me:secret@host:port",
    "me:secret@:x",
    "http://",
]


@pytest.mark.parametrize("setting", BROKEN_PROXIES)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_settings_that_cannot_be_used(scheme, setting, monkeypatch):
    monkeypatch.setenv(f"{scheme}_proxy", setting)
    error = refused(f"{scheme}://host.example/a.png")
    assert isinstance(error, ConnectionError) and f"the setting {scheme}_proxy=" in str(error)
    assert "secret" not in str(error)


def test_photographs_come_through_a_proxy(serving, monkeypatch):
    """With its password; not for hosts that no_proxy names; and no nearer to the private network."""
    proxy = serving(
        {"http://photos.example/a.png": answer(), "http://photos.example/in": redirect("http://[::1]/")}
    )
    monkeypatch.setenv("http_proxy", proxy.url.replace("http://", "http://me:secret@"))
    assert load_image("http://photos.example/a.png").size == (9, 6)
    assert "Proxy-Authorization: Basic bWU6c2VjcmV0\r\n" in proxy.requests[0]
    assert "Host: photos.example\r\n" in proxy.requests[0]
    assert "::1, which is in a private network" in str(refused("http://photos.example/in"))
    direct = serving({"/a.png": answer()})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert load_image(f"{direct.url}/a.png").size == (9, 6)
    assert len(proxy.requests) == 2


def test_a_tunnel_that_the_proxy_refuses(serving, monkeypatch):
    proxy = serving({"photos.example:443": answer(b"", "407 Proxy \x1b[1mno")})
    monkeypatch.setenv("https_proxy", proxy.url.replace("http://", "me:secret@"))
    error = refused("https://photos.example/a.png?secret")
    assert r"the proxy answered 407 Proxy \x1b[1mno" in str(error) and "secret" not in str(error)
    assert proxy.requests[0].startswith("CONNECT photos.example:443 HTTP/1.1\r\nHost: photos.example:443\r\n")


def test_certificate_settings_that_cannot_be_used(serving, monkeypatch, tmp_path):
    url = serving({"/": b""}).url.replace("http:", "https:") + "/a.png"
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "nowhere" / "keys"))
    error = refused(url)
    assert isinstance(error, ConnectionError) and "check " in str(error) and "SSLKEYLOGFILE" in str(error)
    monkeypatch.delenv("SSLKEYLOGFILE")

    def broken(*args, **options):
        raise ssl.SSLError(1, "[X509: NO_CERTIFICATE_OR_CRL_FOUND] no certificate found")

    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setattr(ssl, "create_default_context", broken)
    error = refused(url)
    assert (
        isinstance(error, ConnectionError)
        and "NO_CERTIFICATE" in str(error)
        and "SSL_CERT_FILE" in str(error)
    )


def test_the_next_address_is_tried(serving, monkeypatch):
    server = serving({"/a.png": answer()})
    dead = socket.create_server(("127.0.0.1", 0))
    port = dead.getsockname()[1]
    dead.close()
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", p)) for p in (port, server.port)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: both)
    assert load_image("http://two.example/a.png").size == (9, 6)
    both.pop()
    assert isinstance(refused("http://two.example/a.png"), ConnectionError)
    both.clear()
    assert "two.example has no address" in str(refused("http://two.example/a.png"))


def test_a_downloaded_chunked_picture_is_whole(serving):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(PNG[i : i + 7]), PNG[i : i + 7]) for i in range(0, len(PNG), 7))
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert load_image(serving({"/a": head + chunks + b"0\r\n\r\n"}).url + "/a").tobytes() == PICTURE.tobytes()
    assert http.client.HTTPConnection.debuglevel == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key and a certificate for 127.0.0.1 that signs itself, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("certificate")
    files = ["-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *files, *names]
    subprocess.run(list(map(str, made)), check=True, capture_output=True, timeout=60)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return both


class SecureServer(Server):
    """The same behind TLS; with `tunnel`, behind a CONNECT request in the clear."""

    certificate, tunnel = None, False

    def reply(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.settimeout(5)
            if self.tunnel:
                self.requests.append(connection.recv(65536).decode("latin-1"))
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            super().reply(context.wrap_socket(connection, server_side=True))


@pytest.mark.parametrize("tunnel", [False, True], ids=["direct", "through a proxy"])
def test_photographs_come_encrypted_from_servers_that_are_trusted(tunnel, certificate, monkeypatch):
    server = SecureServer("127.0.0.1", {"/a.png": answer(), "/slow.png": drip(answer(PNG * 9)[:300])})
    server.certificate, server.tunnel = certificate, tunnel
    there = f"127.0.0.1:{'1' if tunnel else server.port}"
    if tunnel:
        monkeypatch.setenv("https_proxy", server.url)
    try:
        error = refused(f"https://{there}/a.png")
        assert isinstance(error, ConnectionError) and "CERTIFICATE_VERIFY_FAILED" in str(error)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert load_image(f"https://{there}/a.png").tobytes() == PICTURE.tobytes()
        assert f"GET /a.png HTTP/1.1\r\nHost: {there}\r\n" in server.requests[-1]
        assert not tunnel or server.requests[-2].startswith(f"CONNECT {there} HTTP/1.1\r\n")
        assert isinstance(refused(f"https://{there}/slow.png", timeout=0.5), TimeoutError)
        assert "mismatch" in str(refused(f"https://localhost:{server.port}/a.png"))
    finally:
        server.close()
