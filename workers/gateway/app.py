"""The HTTP side of the gateway: routes, and the checks around every handler.

Every request ends in bounded time: its body must arrive in time and within its limit, its answer has a deadline, and
the work is cancelled if the caller disconnects. Knows HTTP and JSON; decides nothing about rankings.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from workers.gateway.api_keys import ANYONE, ApiKeys, key_in
from workers.gateway.errors import ApiError
from workers.gateway.limits import RateLimit
from workers.metrics import Metrics
from workers.ports import Interval
from workers.telemetry import names
from workers.telemetry.trace_context import TRACEPARENT, TRACESTATE
from workers.telemetry.tracer import MessageTrace, Tracer

log = structlog.get_logger(__name__)

IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")
#: Status in metrics and logs of a caller that has disconnected; it is not sent.
CLIENT_CLOSED = 499
INTERNAL_ERROR = ApiError(500, "internal_error", "an unexpected error; the gateway's log has it under this trace id")


@dataclass(slots=True)
class Call:
    """One HTTP request that a handler answers."""

    request: Request
    caller: str
    trace: MessageTrace
    max_body_bytes: int
    body_timeout_s: float
    degraded: str | None = None

    async def body(self, max_bytes: int | None = None) -> bytes:
        """Return the whole body. Raises `ApiError` if it is too large or too slow."""
        limit = self.max_body_bytes if max_bytes is None else max_bytes
        declared = self.request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise _body_too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_timeout_s):
                async for chunk in self.request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise _body_too_large(limit)
        except TimeoutError:
            raise ApiError(408, "body_too_slow", f"the body did not arrive within {self.body_timeout_s:g} s") from None
        return bytes(body)

    def request_id(self) -> str | None:
        """Return the request id for the caller's Idempotency-Key, None without the header. Raises `ApiError`."""
        key = self.request.headers.get("idempotency-key")
        if key is None:
            return None
        if not IDEMPOTENCY_KEY.fullmatch(key):
            raise ApiError(
                422, "invalid_idempotency_key", "an Idempotency-Key has 1 to 128 letters, digits or ._:+/=@-"
            )
        # Keys are separate for each caller: the same key of two callers names two requests.
        return f"{self.caller}:{key}"


def _body_too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"the body may have at most {limit} bytes")


Handler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One route. With `is_open` it needs no API key; `max_body_bytes=None` means the gateway's limit."""

    path: str
    method: str
    handler: Handler
    is_open: bool = False
    max_body_bytes: int | None = None


class Gate:
    """Wraps every endpoint: API key, rate limit, trace, metrics, disconnection, errors."""

    def __init__(
        self,
        *,
        keys: ApiKeys,
        rate_limit: RateLimit,
        tracer: Tracer,
        metrics: Metrics,
        clock: Callable[[], float],
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._keys = keys
        self._rate_limit = rate_limit
        self._tracer = tracer
        self._metrics = metrics
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    def guarded(self, endpoint: Endpoint) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        """Return the ASGI application of an endpoint."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            started_at = self._clock()
            hang_up = _HangUp(receive)
            request = Request(scope, hang_up.receive)
            trace = self._tracer.begin(_trace_headers(request))
            self._metrics.http_open.inc()
            call: Call | None = None
            try:
                caller = ANYONE if endpoint.is_open else self._admit(request, started_at)
                limit = self._max_body_bytes if endpoint.max_body_bytes is None else endpoint.max_body_bytes
                call = Call(request, caller, trace, limit, self._body_timeout_s)
                response = await hang_up.run(endpoint.handler(call))
            except ApiError as error:
                self._metrics.gateway_refused[error.code].inc()
                response = error_response(error, trace.trace_id)
            except (ClientDisconnect, _HungUp):
                response = Response(status_code=CLIENT_CLOSED)
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("an HTTP request failed", path=request.url.path, trace_id=trace.trace_id)
                response = error_response(INTERNAL_ERROR, trace.trace_id)
            finally:
                self._metrics.http_open.dec()
            response.headers["Edje-Trace-Id"] = trace.trace_id
            if call is not None and call.degraded is not None:
                response.headers["Edje-Degraded"] = call.degraded
            self._count(endpoint, request, trace, started_at, response.status_code, call)
            with contextlib.suppress(OSError):  # the caller has disconnected
                await response(scope, receive, send)

        return app

    def _admit(self, request: Request, now: float) -> str:
        """Return the caller's name. Raises `ApiError`."""
        key = key_in(request.headers.get("authorization"), request.headers.get("x-api-key"))
        caller = self._keys.caller_of(key)
        if caller is None:
            raise ApiError(
                401,
                "unauthorized",
                "an API key is needed: Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer"},
            )
        self._rate_limit.take(caller, now)
        return caller

    def _count(
        self,
        endpoint: Endpoint,
        request: Request,
        trace: MessageTrace,
        started_at: float,
        status: int,
        call: Call | None,
    ) -> None:
        now = self._clock()
        route = f"{endpoint.method} {endpoint.path}"
        self._metrics.http_requests.labels(route, str(status)).inc()
        self._metrics.http_seconds[route].observe(now - started_at, trace.exemplar())
        if trace.span is not None:
            attributes: dict[str, Any] = {
                names.HTTP_METHOD.name: endpoint.method,
                names.HTTP_ROUTE.name: endpoint.path,
                names.HTTP_STATUS.name: status,
            }
            if call is not None and call.degraded is not None:
                attributes[names.DEGRADED.name] = call.degraded
            self._tracer.record(
                names.HTTP_REQUEST,
                trace.span,
                Interval(started_at, now),
                attributes,
                of=route,
                state=trace.context.state,
                failed=status >= 500,
            )
        log.debug("http", route=route, status=status, ms=round((now - started_at) * 1000, 1), trace_id=trace.trace_id)


class _HungUp(Exception):
    """Raised when the caller has closed the connection."""


class _HangUp:
    """Watches for the end of a caller's connection while a handler works."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_body = asyncio.Event()

    async def receive(self) -> Any:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._has_body.set()
        return message

    async def run(self, handling: Awaitable[Response]) -> Response:
        """Return the handler's answer; cancel it and raise `_HungUp` if the caller hangs up first."""
        work = asyncio.ensure_future(handling)
        watch = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise _HungUp
            return work.result()
        finally:
            watch.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _watch(self) -> None:
        # Begins after the handler has read the body: the next message is the end of the connection.
        await self._has_body.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _trace_headers(request: Request) -> tuple[tuple[str, bytes], ...]:
    return tuple(
        (name.decode("latin-1"), value)
        for name, value in request.headers.raw
        if name in (TRACEPARENT.encode(), TRACESTATE.encode())
    )


class JsonResponse(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def error_response(error: ApiError, trace_id: str | None) -> Response:
    body = {"code": error.code, "message": error.message, "trace_id": trace_id}
    return JsonResponse(body, error.status, error.headers)


#: Headers of every answer that does not set them itself, as the page sets its policy.
SECURITY_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def build_app(gate: Gate, endpoints: list[Endpoint]) -> Any:
    """Return the ASGI application of these endpoints."""
    by_path: dict[str, list[Endpoint]] = {}
    for endpoint in endpoints:
        by_path.setdefault(endpoint.path, []).append(endpoint)
    routes = [Route(path, _Methods(gate, each)) for path, each in by_path.items()]

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(
            ApiError(error.status_code, "not_found", "no such path; GET /openapi.json lists every path"), None
        )

    app = Starlette(routes=routes, exception_handlers={404: not_found})
    app.router.redirect_slashes = False
    return _WithSecurityHeaders(app)


class _Methods:
    """The endpoints of one path, by method."""

    def __init__(self, gate: Gate, endpoints: list[Endpoint]) -> None:
        self._apps = {endpoint.method: gate.guarded(endpoint) for endpoint in endpoints}
        if "GET" in self._apps:
            self._apps["HEAD"] = self._apps["GET"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._apps.get(scope["method"])
        if app is None:
            allowed = ", ".join(self._apps)
            error = ApiError(405, "method_not_allowed", f"this path accepts {allowed}", {"Allow": allowed})
            await error_response(error, None)(scope, receive, send)
            return
        await app(scope, receive, send)


class _WithSecurityHeaders:
    """Adds `SECURITY_HEADERS` to every answer that does not set them itself."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.lower().encode(), value.encode())
                        for name, value in SECURITY_HEADERS.items()
                        if name.lower().encode() not in present
                    ),
                ]
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
