"""A server that speaks S3 on this machine (moto's), and can be told to fail."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

BUCKET = "bucket"
KEY, SECRET = "the-key", "the-secret"

UNAVAILABLE = b"<Error><Code>ServiceUnavailable</Code><Message>try again</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
WRITING = ("PUT", "POST", "DELETE")


class _Quiet(MotoRequestHandler):
    def log_request(self, *_: object) -> None:
        pass


class S3Server:
    """One bucket. Requests without the key are denied, as a private bucket does."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._http = make_server("127.0.0.1", 0, self, True, request_handler=_Quiet)
        self.endpoint_url = f"http://127.0.0.1:{self._http.server_port}"
        self.writes_left: int | None = None
        """So many requests that write go well from now on, then none."""
        self.num_failed = 0

    @property
    def options(self) -> dict[str, Any]:
        """Of the fsspec driver, which doesn't try again by itself, as that would take a minute."""
        once = {"retries": {"total_max_attempts": 1}}
        given = {"key": KEY, "secret": SECRET, "endpoint_url": self.endpoint_url}
        return {**given, "config_kwargs": once}

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if f"Credential={KEY}/" not in environ.get("HTTP_AUTHORIZATION", ""):
            return _refuse(environ, start_response, "403 Forbidden", DENIED)
        if environ["REQUEST_METHOD"] in WRITING and self.writes_left is not None:
            self.writes_left -= 1
            if self.writes_left < 0:
                self.num_failed += 1
                return _refuse(environ, start_response, "503 Service Unavailable", UNAVAILABLE)
        answered: Iterable[bytes] = self._moto(environ, start_response)
        return answered

    def serve(self) -> None:
        """Until `stop`."""
        self._http.serve_forever(poll_interval=0.05)

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._http.shutdown()
        self._http.server_close()


def _refuse(
    environ: dict[str, Any], start_response: Callable[..., Any], status: str, body: bytes
) -> list[bytes]:
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    told = b"" if environ["REQUEST_METHOD"] == "HEAD" else body
    start_response(status, [("Content-Type", "text/xml"), ("Content-Length", str(len(told)))])
    return [told]


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with one empty bucket."""
    server = S3Server()
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield server
    server.stop()
    thread.join()
