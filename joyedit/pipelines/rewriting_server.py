"""A server that is asked to rewrite prompts: OpenAI's chat completions, which vLLM, llama.cpp, Ollama and
others speak too.

A call is one question with pictures. It is asked again where that may help (no connection, an answer of the
kind 429 or 5xx, a text that is no answer), three times at most, and one deadline holds for all of it. The key
goes to the address that was named and to no other: no redirect is followed. Messages name a server without
the path of its address, and repeat nothing of what it says that holds a part of the key.

Source: OpenAI's reference of POST /chat/completions; jd-opensource/JoyAI-Image `prompt_rewrite.py`, which has
the temperature, the JSON mode and the number of attempts.
"""

import base64
import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from joyedit.checkpoints.plain_text import shown, visible
from joyedit.media.download import Reply, is_url, post, shown_url

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "OPENAI_API_KEY"
MODEL = "gpt-5"  # the publisher's
TIMEOUT, LONGEST_TIMEOUT = 60.0, 3600.0
ATTEMPTS = 3
PAUSE = 0.5  # seconds before the second attempt, twice as many before each next
QUALITY = 90  # of JPEG
MOST_BYTES = 1 << 20  # of an answer, which is a prompt
TELLING = 8  # so many characters of a key in a row are a part of it
AGAIN = (408, 409, 425, 429)  # and 5xx: what may be otherwise in a moment
UNWANTED = (400, 422)  # what servers say that have no JSON mode


class Failed(Exception):
    """Why there is no answer, in words. again: whether there may be one in a moment."""

    def __init__(self, reason: str, again: bool = False):
        super().__init__(reason)
        self.again = again


@dataclasses.dataclass(frozen=True)
class Server:
    """Where an OpenAI-compatible server is, and what it is asked for.

    base: its address, which ends in /v1: http://localhost:8000/v1. model: what it calls the model. timeout:
    seconds until there must be an answer, all attempts together. key: None takes that of the environment,
    OPENAI_API_KEY; "" sends none.

    Raises ValueError for an address with anything else in it, such as a password or a key, for a timeout that
    is not above 0 (and at most an hour), and for a key that no header can hold.
    """

    base: str
    model: str = MODEL
    timeout: float = TIMEOUT
    key: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        key = os.environ.get(KEY, "") if self.key is None else self.key
        object.__setattr__(self, "base", check_base(self.base))
        object.__setattr__(self, "timeout", check_timeout(self.timeout))
        object.__setattr__(self, "key", check_key(key))
        if not isinstance(self.model, str) or not self.model.strip():
            raise ValueError("model is empty: what does the server call the model?")

    def __str__(self) -> str:
        """Without the path, in which some gateways have a key."""
        return origin(self.base)

    def ask(self, system: str, pictures: "Sequence[Image]", question: str, read: Callable[[str], str]) -> str:
        """What `read` makes of the answer; it raises ValueError for a text that is none. Raises Failed."""
        deadline = time.monotonic() + self.timeout
        name = self.model.lower()
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": content_of(pictures, question)},
            ],
            # These take no other, or not 0.
            "temperature": 1 if "gpt-5" in name or name.startswith("minimax") else 0,
            "response_format": {"type": "json_object"},
        }
        for attempt in range(ATTEMPTS):
            pause = PAUSE * 2**attempt
            try:
                reply = self._post(body, deadline)
                if reply.status in UNWANTED and attempt + 1 < ATTEMPTS and body.pop("response_format", None):
                    continue  # at once, without the mode
                return self._read(reply, read)
            except Failed as failed:
                if not failed.again or attempt + 1 == ATTEMPTS or time.monotonic() + pause >= deadline:
                    asked = f" (asked {attempt + 1} times)" if attempt else ""
                    message = f"{self} {failed}{asked}"
                    told = f"{self} repeats a part of the key, so that nothing of it is shown"
                    raise Failed(told if self._tells_key(message) else message) from None
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: dict[str, Any], deadline: float) -> Reply:
        late = Failed(f"did not answer within {self.timeout:g} seconds")
        left = deadline - time.monotonic()
        if left <= 0:
            raise late
        headers = ["Content-Type: application/json", "Accept: application/json"]
        if self.key:
            headers.append(f"Authorization: Bearer {self.key}")
        try:
            return post(f"{self.base}/chat/completions", json.dumps(body).encode(), headers, left, MOST_BYTES)
        except TimeoutError:
            raise late from None
        except (ConnectionError, ValueError) as error:
            raise Failed(str(error), again=True) from None

    def _read(self, reply: Reply, read: Callable[[str], str]) -> str:
        if reply.status != 200:
            self._refuse(reply)
        try:
            text = json.loads(reply.content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise Failed(f"answered no chat completion: {self._said(reply.content)}", again=True) from None
        if not isinstance(text, str):
            raise Failed(f"answered {shown(text, 40)} in place of a text", again=True)
        if self._tells_key(text):
            raise Failed("answered with a part of the key")
        try:
            return read(text)
        except ValueError as error:
            raise Failed(f"answered what is no prompt: {error}", again=True) from None

    def _refuse(self, reply: Reply) -> NoReturn:
        """Raises Failed for an answer of another status than 200."""
        said = f"answered {reply.status} {visible(reply.reason, 40)}".rstrip()
        if 300 <= reply.status < 400 and reply.location is not None:
            there = visible(origin(reply.location), 80) if is_url(reply.location) else "elsewhere"
            raise Failed(
                f"{said} and leads to {there}, which is not followed: name that address if it is meant"
            )
        if reply.status in (401, 403):
            raise Failed(f"{said}: it does not take the key in {KEY}" if self.key else f"{said}: set {KEY}")
        if reply.status == 404:
            said += f" for model {shown(self.model, 60)}"
        raise Failed(f"{said}: {self._said(reply.content)}", reply.status in AGAIN or reply.status >= 500)

    @staticmethod
    def _said(content: bytes) -> str:
        """What an answer says."""
        text = content.decode("utf-8", "replace")
        try:
            body = json.loads(text)
            error = body.get("error", body)
            text = error if isinstance(error, str) else error.get("message") or body["detail"]
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            pass
        return visible(str(text).strip() or "nothing", 120)

    def _tells_key(self, text: str) -> bool:
        """Whether a text holds the key, or a part of it. A key that is a word ("none", "EMPTY"), as servers
        that need none get, is no secret."""
        key = self.key or ""
        if not key or (key.isalpha() and len(key) < 2 * TELLING):
            return False
        length = min(TELLING, len(key))
        return any(key[i : i + length] in text for i in range(len(key) - length + 1))


def content_of(pictures: "Sequence[Image]", question: str) -> Any:
    """The user's turn: pictures before the text, or a text alone, which every server reads."""
    if not pictures:
        return question
    seen = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return [*seen, {"type": "text", "text": question}]


def data_url(picture: "Image") -> str:
    """The picture as JPEG, its pixels alone: no EXIF, position or profile."""
    bare = picture.convert("RGB").copy()
    bare.info = {}
    file = io.BytesIO()
    bare.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def check_base(base: Any) -> str:
    """The address without a last slash. Raises TypeError or ValueError, which repeat no user, password,
    query or path."""
    if not isinstance(base, str):
        raise TypeError(f"the server is a {type(base).__name__}: must be a URL that ends in /v1")
    example = "as in http://localhost:8000/v1"
    if not is_url(base):
        raise ValueError(f"the server must be an http or https URL, {example}")
    if "@" in base or "?" in base or "#" in base:
        what = "a user or password" if "@" in base else "a query"
        raise ValueError(f"{origin(base)}: no URL with {what} is taken; the key goes into {KEY}")
    try:
        parts = urlsplit(base)
        if not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise ValueError(f"the server's URL is malformed: wanted is one {example}") from None
    if not parts.path.rstrip("/").endswith("/v1"):
        raise ValueError(f"{origin(base)}: the server's URL must end in /v1, {example}")
    return base.rstrip("/")


def check_timeout(timeout: Any) -> float:
    """Raises TypeError for what is no number, ValueError for one that is no time to wait."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout is a {type(timeout).__name__}: must be a number of seconds")
    if not (math.isfinite(timeout) and 0 < timeout <= LONGEST_TIMEOUT):
        raise ValueError(f"timeout={timeout:g}: must be above 0, and at most {LONGEST_TIMEOUT:g} seconds")
    return float(timeout)


def check_key(key: Any) -> str:
    """The key without spaces around it. Raises ValueError, which does not repeat it, for one that no header
    can hold."""
    if not isinstance(key, str) or not all("!" <= letter <= "~" for letter in key.strip()):
        raise ValueError(f"the key (of {KEY}, where none is passed) holds what no header can")
    return key.strip()


def origin(url: str) -> str:
    """Scheme, host and port."""
    scheme, slashes, rest = shown_url(url).partition("://")
    return f"{scheme}{slashes}{rest.partition('/')[0]}"
