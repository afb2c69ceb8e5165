"""The page and the JSON API: what is let in, in which order, and what is said to those who are not.

    POST /api/predict?min_score=0.3&maps=true     body: an image file  ->  detections (see `schema`)
    GET  /api/model, /api/schema, /health, /      the model, this API, the state, the page

A request takes its place before a byte of its upload is read: memory is bounded by places times the largest upload.
"""

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import Answerer, BadUpload
from .desk import Busy, Desk, Late
from .schema import schema

logger = logging.getLogger(__name__)

_PAGE = os.path.join(os.path.dirname(__file__), "page")
_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """What is put up with.

    Attributes:
        queue: requests that are in at once, from the first byte of their upload to their answer.
        upload: bytes of an upload.
        upload_seconds: that an upload may take.
        answer_seconds: that an answer may take after that, waiting included.
        hosts: names in the address that browsers may use, which keeps other sites' pages out; empty: any.
    """

    queue: int = 16
    upload: int = 20 * 2**20
    upload_seconds: float = 20.0
    answer_seconds: float = 60.0
    hosts: tuple[str, ...] = ()


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, text: str, **headers: str):
        super().__init__(text)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


def make_app(answerer: Answerer, limits: Limits) -> ASGIApp:
    """The application; it works in one process and one event loop."""
    desk = Desk(limits.queue, limits.answer_seconds)
    counts: Counter[str] = Counter()

    async def predict(request: Request) -> Response:
        try:
            answer = await _answer(request, answerer, desk, limits)
        except Refused as refused:
            counts["busy" if refused.status == 429 else "refused"] += 1
            return JSONResponse({"error": str(refused)}, refused.status, refused.headers)
        except Exception:
            counts["failed"] += 1
            logger.exception("An image could not be answered")
            return JSONResponse({"error": "something went wrong inside; the log of the server says what"}, 500)
        counts["gone" if answer is None else "answered"] += 1
        return Response(status_code=499) if answer is None else JSONResponse(answer)

    async def model(request: Request) -> Response:
        about = answerer.about() | {"max_upload_bytes": limits.upload, "queue": limits.queue}
        return JSONResponse(about)

    async def health(request: Request) -> Response:
        kinds = ("answered", "busy", "refused", "failed", "gone")
        numbers = {kind: counts[kind] for kind in kinds}
        state = {"status": "ok", "in": desk.taken, "places": desk.places, "seconds": round(desk.seconds, 4)}
        return JSONResponse(state | numbers)

    async def page(request: Request) -> Response:
        return FileResponse(os.path.join(_PAGE, _FILES[request.url.path]))

    async def described(request: Request) -> Response:
        return JSONResponse(schema(limits.upload))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(desk.close)

    routes = [
        Route("/api/predict", predict, methods=["POST"]),
        Route("/api/model", model),
        Route("/api/schema", described),
        Route("/health", health),
        *(Route(path, page) for path in _FILES),
    ]
    return _Guard(Starlette(routes=routes, lifespan=lifespan), limits.hosts)


async def _answer(request: Request, answerer: Answerer, desk: Desk, limits: Limits) -> dict | None:
    min_score, maps = _options(request)
    try:
        with desk.place() as place:
            data = await _upload(request, limits)
            gone = asyncio.ensure_future(_hung_up(request.receive))
            try:
                return await place.work(lambda: answerer(data, min_score, maps), gone)
            finally:
                gone.cancel()
    except Busy as busy:
        text = f"{desk.places} requests are being answered already; try again in {busy.seconds} s"
        raise Refused(429, text, retry_after=str(busy.seconds)) from None
    except Late:
        text = f"there was no answer within {limits.answer_seconds:g} s"
        raise Refused(503, text, retry_after=str(desk.wait_hint())) from None
    except BadUpload as error:
        raise Refused(error.status, str(error)) from error
    except ClientDisconnect:
        return None


def _options(request: Request) -> tuple[float, bool]:
    given = dict(request.query_params)
    try:
        min_score = float(given.pop("min_score", "0"))
    except ValueError:
        min_score = -1.0
    if not 0 <= min_score <= 1:
        raise Refused(400, "min_score is a number from 0 to 1")
    maps = given.pop("maps", "false")
    if maps not in ("true", "false"):
        raise Refused(400, "maps is true or false")
    if given:
        raise Refused(400, "unknown parameters; there are min_score and maps")
    return min_score, maps == "true"


async def _upload(request: Request, limits: Limits) -> bytes:
    # The connection stays open for a while, and what still comes is thrown away: clients that write before they read
    # would see a broken pipe, and no answer.
    too_large = Refused(413, f"the upload is too large; at most {limits.upload} bytes are taken")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limits.upload:
        raise too_large
    data = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            data.extend(chunk)
            if len(data) > limits.upload:
                raise too_large

    try:
        await asyncio.wait_for(read(), limits.upload_seconds)
    except asyncio.TimeoutError:
        text = f"the upload took longer than {limits.upload_seconds:g} s"
        raise Refused(408, text, connection="close") from None
    return bytes(data)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Guard:
    """Lets in what was meant for this server, and tells browsers what the page may do."""

    def __init__(self, app: Callable, hosts: tuple[str, ...]):
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = given.get(b"host", "")
        host = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
        app = self._app
        if self._hosts and host.lower() not in self._hosts:
            app = JSONResponse({"error": "this server answers to other names"}, 421)
        elif scope["method"] == "POST" and given.get(b"sec-fetch-site", "none") not in ("none", "same-origin"):
            app = JSONResponse({"error": "pages of other sites are not answered"}, 403)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await app(scope, receive, with_headers)
