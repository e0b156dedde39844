"""The server: of one URL with a random token, on the loopback interface, to read alone."""

import hmac
import html
import json
import secrets
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .. import _page
from .runs import WatchedRun

HOST = "127.0.0.1"
_SCRIPTS = "format.js", "chart.js", "view.js"


@contextmanager
def serving(runs: Sequence[WatchedRun], port: int = 0) -> Iterator[str]:
    """Serves runs as long as the context lasts, and yields the URL.

    **Arguments:** `runs`: what is served; `port`: 0 takes one that is free.

    **Returns:** a context manager, whose value is the URL.

    **Raises:** `ValueError` where the port cannot be had.
    """
    token = secrets.token_urlsafe(24)
    try:
        server = _Server((HOST, port), _handler(runs, token))
    except OSError as error:
        raise ValueError(
            f"--port must be one that is free, got {port}: {error.strerror}. Take another, or 0 "
            "for any that is free."
        ) from None
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/{token}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A browser may leave in the middle of an answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            ThreadingHTTPServer.handle_error(self, request, client_address)


def _handler(runs: Sequence[WatchedRun], token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "jaxflow", ""
        timeout = 10  # of a connection that says nothing

        def do_GET(self):
            port = self.connection.getsockname()[1]
            # Another name that leads here is that of a page which would read what is served.
            if self.headers.get_all("Host") not in ([f"{HOST}:{port}"], [f"localhost:{port}"]):
                return self.answer(403, "text/plain", "The Host is not this server.\n")
            _, given, *rest = [*self.path.split("/"), ""]
            if not hmac.compare_digest(given.encode(), token.encode()):
                return self.answer(403, "text/plain", "The URL needs the token it was given.\n")
            found = _found(runs, rest[:-1])
            if found is None:
                return self.answer(404, "text/plain", "There is no such page.\n")
            self.answer(200, *found)

        def answer(self, status: int, kind: str, text: str):
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            for name, value in _GUARDS.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args):
            """Nothing: the terminal holds the URL."""

    return Handler


_GUARDS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'self'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def _found(runs: Sequence[WatchedRun], path: list[str]) -> tuple[str, str] | None:
    """What is at a path after the token: a kind and a text."""
    numbered = {str(k): run for k, run in enumerate(runs)}
    match path:
        case [""]:
            return "text/html", _view(runs)
        case ["state"]:
            return "application/json", json.dumps([run.state() for run in runs])
        case ["metrics", k] if k in numbered:
            return "application/json", json.dumps(numbered[k].metrics())
        case ["film", k] if k in numbered:
            return "text/html", _film(numbered[k])
    return None


def _view(runs: Sequence[WatchedRun]) -> str:
    return _page.assemble(
        "jaxflow view",
        _page.asset("view.html"),
        styles=["view.css"],
        scripts=_SCRIPTS,
        data=[run.about() for run in runs],
        policy="; connect-src 'self'; frame-src 'self'",
    )


def _film(run: WatchedRun) -> str:
    """A page of ours around the data of the run."""
    try:
        return _page.film(run.name, run.film())
    except (ValueError, OSError) as problem:
        text = f"flow.html of {run.name} cannot be played: {problem}"
        return _page.assemble(run.name, f"<p class=fail>{html.escape(text)}</p>")
