"""What ``fpn-d2 serve`` does: the application behind uvicorn, and a clean end."""

import contextlib
import ipaddress
import signal
import socket
import sys

import numpy as np

from fpn_d2.errors import UserError
from fpn_d2.inference import Predictor

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from .app import Limits, make_app
except ImportError as error:
    raise UserError(f"fpn-d2 serve needs {error.name}: pip install 'fpn_d2[serve]'") from error

from .answers import Answerer

_HEADER_BYTES = 16 * 2**10
_IDLE_SECONDS = 10.0  # of a connection that asks for nothing, or is slow to say what
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class _Connection(H11Protocol):
    """Closed where no request has come within `_IDLE_SECONDS`; uvicorn waits for ever for the first, and slow ones."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        self.loop.call_later(_IDLE_SECONDS, self._close_if_idle, self.cycle)

    def _close_if_idle(self, last) -> None:
        if self.cycle is last and (last is None or last.response_complete) and not self.transport.is_closing():
            self.transport.close()


def serve(
    predictor: Predictor,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    queue: int = 16,
    max_upload: float = 20.0,
    max_pixels: float = 40.0,
    timeout: float = 60.0,
) -> None:
    """Serve the page and the API until SIGTERM or SIGINT; what has been let in by then is answered.

    Args:
        predictor: the detector.
        host: address to listen at; others than the loopback's are reachable from other machines.
        port: 0: any that is free.
        queue: requests that are in at once; more get a 429.
        max_upload: of a file, in MB.
        max_pixels: of an image, in millions.
        timeout: seconds that an answer may take.

    Raises:
        UserError: the address cannot be listened at.
    """
    for name, value in (("queue", queue), ("max_upload", max_upload), ("max_pixels", max_pixels), ("timeout", timeout)):
        if not value > 0:
            raise UserError(f"{name} is {value}; expected more than 0")
    listener = _listen(host, port)
    with contextlib.closing(listener):
        hosts = _LOOPBACK_NAMES if _is_loopback(host) else ()
        limits = Limits(queue, int(max_upload * 2**20), answer_seconds=timeout, hosts=hosts)
        app = make_app(Answerer(predictor, int(max_pixels * 1e6)), limits)
        config = uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            lifespan="on",
            access_log=False,
            log_level="error",
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_HEADER_BYTES,
            limit_concurrency=queue + 1000,
            timeout_keep_alive=int(_IDLE_SECONDS),
            timeout_graceful_shutdown=int(timeout + limits.upload_seconds) + 1,
        )
        predictor(np.full((480, 640, 3), 127, np.uint8), channels="BGR")  # what is slow once is done before the first
        address = f"[{host}]" if ":" in host else host
        print(f"Serving at http://{address}:{listener.getsockname()[1]} (Ctrl+C ends it)", flush=True)
        if not hosts:
            print(f"{host} can be reached from other machines, and nobody is asked who they are.", file=sys.stderr)
        # uvicorn sends itself the signal again once all is done; this is what it meets then.
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    print("Stopped.", flush=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host}, port {port}: {said}; name others (--host, --port)") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
