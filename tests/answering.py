"""A server on this machine that stands for one of OpenAI's kind, and does what a test tells it to."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Asked(NamedTuple):
    path: str
    headers: dict[str, str]
    body: Any


class AnsweringServer:
    """Each request gets the next of `answers`, and the last of them again and again: a text that is the
    content of a chat completion, (status, content, headers), or a function that is given the handler."""

    def __init__(self, *answers: Any):
        self.answers, self.asked, self.over = list(answers), [], threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append(Asked(self.path, dict(self.headers), json.loads(content)))
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                with contextlib.suppress(OSError):  # who asked has gone
                    outer.reply(self, answer)

            def do_GET(self) -> None:
                outer.asked.append(Asked(self.path, dict(self.headers), None))
                outer.reply(self, "")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.origin = f"http://127.0.0.1:{self.server.server_port}"
        self.base = f"{self.origin}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def reply(self, handler: BaseHTTPRequestHandler, answer: Any) -> None:
        if callable(answer):
            answer(handler)
            return
        status, content, headers = (200, completion(answer), {}) if isinstance(answer, str) else answer
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def hang(self, handler: Any) -> None:
        self.over.wait(5)

    def trickle(self, handler: Any) -> None:
        """Never stops for long, and never comes to an end."""
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        while not self.over.wait(0.02):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


def completion(text: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


def rewritten(prompt: str) -> str:
    return json.dumps({"Rewritten": prompt})


@contextlib.contextmanager
def answering() -> Iterator[Callable[..., AnsweringServer]]:
    """Makes servers, and ends them."""
    running: list[AnsweringServer] = []

    def serve(*answers: Any) -> AnsweringServer:
        running.append(AnsweringServer(*answers))
        return running[-1]

    try:
        yield serve
    finally:
        for server in running:
            server.close()
