"""A photograph's bytes from the web, and what a server answers to what it is sent.

One deadline holds for everything: looking the name up, connecting, headers, redirects and body. Each name is
looked up once, and the connection goes to an address that was checked, so that a name that changes its
address in between wins nothing. A redirect leads to http and https only, and into a private network (loopback
and link-local included) only when the first URL was there; with what is sent, none is followed. Proxies are
those of the environment; behind one, it looks names up, and only hosts that are written as addresses can be
checked here.

What is said of a URL leaves out its user, password and query, which may hold a key.

Source: RFC 9110 and RFC 9112; urllib.request for the environment's proxies.
"""

import base64
import contextlib
import dataclasses
import io
import ipaddress
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from joyedit.checkpoints.plain_text import visible

if TYPE_CHECKING:  # slow to import, and most runs read a file
    import http.client
    import socket

REDIRECTS = 10
PORTS = {"http": 80, "https": 443}
SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)  # two letters or more: C:// is a drive
START = re.compile(r"([a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
HOST = re.compile(r"[\w.:~%-]+", re.ASCII)
READY = "!$%&'()*+,/:;=?@[]~"  # characters of a URL that stand for themselves
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_url(text: str) -> bool:
    """Whether the text is an http or https URL, in whatever case its scheme is written."""
    return url_scheme(text) in PORTS


def url_scheme(text: str) -> str | None:
    """The scheme of a URL in lower case; None for what is none, such as a path."""
    found = SCHEME.match(text)
    return found[1].lower() if found else None


def shown_url(url: str) -> str:
    """The URL as it may be shown: without user, password, query and fragment."""
    start = START.match(url)
    if start is None:
        return re.split(r"[?#]", url, maxsplit=1)[0]
    rest = url[start.end() :]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" not in authority and not re.fullmatch(r"(\[.*\]|[^:]*)(:\d*)?", authority):
        rest = rest[rest.rfind("@") + 1 :]  # a password with a "/" in it ends later than the host would
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, slash, path = rest.partition("/")
    return f"{start[0]}{authority[authority.rfind('@') + 1 :]}{slash}{path}"


def download(url: str, timeout: float, max_bytes: int) -> bytes:
    """What an http or https URL holds.

    Raises TimeoutError when it is not there within `timeout` seconds, FileNotFoundError for a missing page,
    ConnectionError when the connection, the server or the settings for it fail, ValueError for what is no
    valid URL and for more than `max_bytes` bytes; all of them name the picture.
    """
    import http.client

    picture = f"image {shown_url(url)!r}"
    try:
        return _fetch(url, time.monotonic() + timeout, max_bytes)
    except _Refused as refused:
        kind, reason = refused.args
        raise kind(f"{picture} {reason}") from None
    except TimeoutError:
        raise TimeoutError(f"{picture} did not arrive within timeout={timeout:g} seconds") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = visible(str(error).strip()) or type(error).__name__
        raise ConnectionError(f"{picture} could not be fetched: {reason}{_settings(error)}") from None


class Reply(NamedTuple):
    """Of any status. location: where a redirect would lead."""

    status: int
    reason: str
    location: str | None
    content: bytes


def post(url: str, content: bytes, headers: Sequence[str], timeout: float, max_bytes: int) -> Reply:
    """What a server answers to `content` that is sent to an http or https URL. No redirect is followed.

    headers: lines, such as "Authorization: Bearer ...". Raises TimeoutError when the answer is not there
    within `timeout` seconds, ConnectionError when the connection, the server or the settings for it fail,
    ValueError for what is no valid URL and for an answer of more than `max_bytes` bytes.
    """
    import http.client

    deadline = time.monotonic() + timeout
    try:
        target = _parse(url)
    except ValueError as error:
        raise ValueError(f"is no valid URL: {error}") from None
    try:
        with contextlib.ExitStack() as opened:
            response, _ = _ask(target, deadline, True, opened, _Request("POST", tuple(headers), content))
            location = response.getheader("Location")
            return Reply(response.status, response.reason, location, _content(response, max_bytes))
    except _Refused as refused:
        kind, reason = refused.args
        raise kind(f"answered more than {max_bytes:,} bytes" if kind is ValueError else reason) from None
    except TimeoutError:
        raise TimeoutError(f"did not answer within {timeout:g} seconds") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = visible(str(error).strip()) or type(error).__name__
        raise ConnectionError(f"could not be reached: {reason}{_settings(error)}") from None


def is_private(address: str) -> bool:
    """Whether an IP address is not one of the public internet: private, loopback, link-local, reserved. An
    IPv6 address that stands for an IPv4 one is that one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        ip = inner or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip)
    return ip.is_multicast or not ip.is_global


class _Refused(Exception):
    """(kind of exception, reason): what `download` raises, once it has put the picture's name before it."""


@dataclasses.dataclass(frozen=True)
class _Target:
    """Where a URL points."""

    url: str
    scheme: str
    host: str
    port: int
    resource: str  # path and query
    credentials: str | None

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS.get(self.scheme) else f"{host}:{self.port}"

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port


@dataclasses.dataclass(frozen=True)
class _Request:
    """What is sent, but for the lines that every request has."""

    method: str = "GET"
    headers: tuple[str, ...] = ()
    content: bytes = b""


def _parse(url: str) -> _Target:
    """Raises ValueError for what is no URL; in words of our own, since urllib's may repeat a password."""
    from urllib.parse import quote, unquote, urlsplit

    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()  # labels of more than 63 bytes end here
    except ValueError:
        raise ValueError("its host is malformed") from None
    if not HOST.fullmatch(host):
        raise ValueError("its host is missing or malformed")
    try:
        port = parts.port if parts.port is not None else PORTS.get(parts.scheme, 80)
    except ValueError:
        raise ValueError("its port is no number up to 65535") from None
    credentials = None
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        credentials = "Basic " + base64.b64encode(user.encode()).decode()
    query = f"?{quote(parts.query, safe=READY)}" if parts.query else ""
    resource = quote(parts.path or "/", safe=READY) + query
    return _Target(url, parts.scheme, host, port, resource, credentials)


def _fetch(url: str, deadline: float, max_bytes: int) -> bytes:
    try:
        target = _parse(url)
    except ValueError as error:
        raise _Refused(ValueError, f"is no valid URL: {error}") from None
    private = True
    for hop in range(REDIRECTS + 1):
        with contextlib.ExitStack() as opened:
            response, inside = _ask(target, deadline, private, opened)
            if hop == 0:
                private = inside
            location = response.getheader("Location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                return _body(response, max_bytes)
        target = _follow(target, location)
    raise _Refused(ConnectionError, f"could not be fetched: more than {REDIRECTS} redirects")


def _follow(target: _Target, location: str) -> _Target:
    from urllib.parse import quote, urljoin

    # Headers are read as latin-1: so the bytes stay what they are.
    location = quote(location, safe=f"{READY}#", encoding="latin-1", errors="replace")
    moved = f"was redirected to {shown_url(location)[:200]!r}"
    try:
        url = urljoin(target.url, location)
        if not is_url(url):
            raise _Refused(ConnectionError, f"{moved}: only http and https are followed")
        there = _parse(url)
    except ValueError:
        raise _Refused(ConnectionError, f"{moved}, which is no valid URL") from None
    if there.origin == target.origin and there.credentials is None:
        return dataclasses.replace(there, credentials=target.credentials)
    return there


def _ask(
    target: _Target,
    deadline: float,
    private: bool,
    opened: contextlib.ExitStack,
    request: _Request = _Request(),
) -> "tuple[http.client.HTTPResponse, bool]":
    """Send the request; returns the answer, its headers read, and whether it came from a private address."""
    proxy = _proxy(target)
    if proxy is None:
        sock = opened.enter_context(_connect(target.host, target.port, deadline, private))
        inside = is_private(sock.getpeername()[0])
    else:
        inside = _written_private(target.host)
        if inside and not private:
            raise _into_private(target.host)
        sock = opened.enter_context(_connect(proxy.host, proxy.port, deadline, True))
    via = [f"Proxy-Authorization: {proxy.credentials}"] if proxy and proxy.credentials else []
    plain = target.scheme == "http"
    if proxy and not plain:  # as in urllib, a tunnel is asked for in the clear, whatever the proxy's scheme
        host = f"[{target.host}]" if ":" in target.host else target.host
        end = f"{host}:{target.port}"
        answer = _exchange(sock, [f"CONNECT {end} HTTP/1.1", f"Host: {end}", *via], deadline)
        if answer.status != 200:
            said = f"{answer.status} {visible(answer.reason)}"
            raise _Refused(ConnectionError, f"could not be fetched: the proxy answered {said}")
    if not plain:
        sock = opened.enter_context(_encrypt(sock, target.host, deadline))
    elif proxy and proxy.scheme == "https":
        sock = opened.enter_context(_encrypt(sock, proxy.host, deadline))
    resource = f"http://{target.netloc}{target.resource}" if proxy and plain else target.resource
    lines = [
        f"{request.method} {resource} HTTP/1.1",
        f"Host: {target.netloc}",
        "User-Agent: joyedit",
        "Accept-Encoding: identity",
        "Connection: close",
        *([f"Authorization: {target.credentials}"] if target.credentials else []),
        *(via if plain else []),
        *request.headers,
        *([f"Content-Length: {len(request.content)}"] if request.content else []),
    ]
    return _exchange(sock, lines, deadline, request.method, request.content), inside


def _body(response: "http.client.HTTPResponse", max_bytes: int) -> bytes:
    if not 200 <= response.status < 300:
        kind = FileNotFoundError if response.status in (404, 410) else ConnectionError
        said = f"{response.status} {visible(response.reason)}"
        raise _Refused(kind, f"could not be fetched: the server answered {said}")
    return _content(response, max_bytes)


def _content(response: "http.client.HTTPResponse", max_bytes: int) -> bytes:
    lengths = {length.strip() for length in response.headers.get_all("Content-Length") or ()}
    if len(lengths) > 1 or not all(length.isascii() and length.isdigit() for length in lengths):
        said = visible(", ".join(sorted(lengths))[:100])
        raise _Refused(ConnectionError, f"could not be fetched: the server says Content-Length: {said}")
    too_large = _Refused(ValueError, f"is larger than max_bytes={max_bytes:,}")
    if any(len(length) > 18 or int(length) > max_bytes for length in lengths):
        raise too_large
    content = bytearray()
    while chunk := response.read1(1 << 16):
        content += chunk
        if len(content) > max_bytes:
            raise too_large
    if response.length:
        raise _Refused(ConnectionError, f"was cut off, {response.length:,} bytes are missing")
    return bytes(content)


class _Stream(io.RawIOBase):
    """What arrives on a socket, until the deadline. http.client takes it for the socket."""

    def __init__(self, sock: "socket.socket", deadline: float):
        self.sock, self.deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(_left(self.deadline))
        return self.sock.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)


def _exchange(
    sock: "socket.socket", lines: list[str], deadline: float, method: str = "GET", content: bytes = b""
) -> "http.client.HTTPResponse":
    import http.client

    sock.settimeout(_left(deadline))
    sock.sendall("\r\n".join([*lines, "", ""]).encode("ascii") + content)
    stream: Any = _Stream(sock, deadline)
    response = http.client.HTTPResponse(stream, method=method)
    response.begin()
    return response


def _connect(host: str, port: int, deadline: float, private: bool) -> "socket.socket":
    """Connect to the first address of the host that answers, within its share of the time that is left."""
    import socket

    addresses = _look_up(host, port, deadline)
    if not private and any(is_private(address[0]) for *_, address in addresses):
        raise _into_private(host)
    failure = OSError(f"{host} has no address")
    for i, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(_left(deadline) / (len(addresses) - i))
            sock.connect(address)
            return sock
        except OSError as error:
            failure = error
            sock.close()
    raise failure


def _look_up(host: str, port: int, deadline: float) -> list[tuple]:
    """`socket.getaddrinfo`, which knows no timeout, in a thread that nobody waits for after the deadline."""
    import queue
    import socket
    import threading

    answer = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answer.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=look_up, daemon=True, name="joyedit-name-lookup").start()
    try:
        found = answer.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    return found


def _encrypt(sock: "socket.socket", host: str, deadline: float) -> "socket.socket":
    import ssl

    context = ssl.create_default_context()
    sock.settimeout(_left(deadline))
    return context.wrap_socket(sock, server_hostname=host)


def _proxy(target: _Target) -> _Target | None:
    """The proxy that the environment names for this target, as far as urllib would use it."""
    from urllib.request import getproxies, proxy_bypass

    setting = getproxies().get(target.scheme)
    if not setting or proxy_bypass(target.netloc):
        return None
    setting = setting if "://" in setting else f"http://{setting}"
    try:
        proxy = _parse(setting)
        if proxy.scheme not in PORTS:
            raise ValueError(f"{visible(proxy.scheme)} is not supported")
    except ValueError as error:
        name = f"{target.scheme}_proxy={visible(shown_url(setting))}"
        reason = f"could not be fetched: the setting {name} is not the http address of a proxy ({error})"
        raise _Refused(ConnectionError, reason) from None
    return proxy


def _written_private(host: str) -> bool:
    """Whether a host is written as a private address, in any spelling of it, or is this machine by name."""
    import socket

    if host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost"):
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except OSError:
        return False
    return any(is_private(str(address[0])) for *_, address in found)


def _into_private(host: str) -> _Refused:
    reason = f"was redirected to {host}, which is in a private network: give that URL itself if you trust it"
    return _Refused(ConnectionError, reason)


def _left(deadline: float) -> float:
    """The seconds until the deadline. Raises TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, 1e6)  # sockets take no infinite number


def _settings(error: BaseException) -> str:
    """Which settings of the environment an error about certificates may be about."""
    import os
    import ssl

    names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE") if os.environ.get(name)]
    about = isinstance(error, (ssl.SSLError, FileNotFoundError, PermissionError))
    return f" (check {', '.join(names)})" if about and names else ""
