"""Serves the search page and the waterfalls of requests.

The page is one template with a style sheet and modules from the folder `assets`.

The page loads nothing from other hosts, and its policy forbids it. The template escapes every value.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import Response

from workers.gateway.app import Call, Endpoint
from workers.gateway.errors import ApiError
from workers.telemetry.span_file import predecessor_of
from workers.traces.reading import read_spans
from workers.traces.showing import page_of
from workers.traces.waterfall import waterfall_of

FOLDER = Path(__file__).parent / "assets"
TEMPLATE = "page.html"
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
#: Pictures are thumbnails of this gateway, or the user's files before their upload (`blob:`).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


class SearchPage:
    """The page and its assets; rendered and read once, at the start."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """`options` are passed to the page's modules, as JSON in the document."""
        self._assets = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in _MEDIA_TYPES}
        # Part of every asset's address, so that assets may be cached for long and are loaded again after a change.
        joined = b"".join(name.encode() + data for name, data in sorted(self._assets.items()))
        self._version = hashlib.sha256(joined).hexdigest()[:12]
        environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
        page = environment.get_template(TEMPLATE).render(
            options=orjson.dumps(options).decode(), examples=options["examples"], version=self._version
        )
        self._page = page.encode()

    def endpoints(self) -> list[Endpoint]:
        """Return the routes of the page."""
        return [
            Endpoint("/", "GET", self.page, is_open=True),
            Endpoint("/assets/{version}/{name}", "GET", self.asset, is_open=True),
        ]

    async def page(self, call: Call) -> Response:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return Response(self._page, media_type="text/html", headers=headers)

    async def asset(self, call: Call) -> Response:
        name = call.request.path_params["name"]
        data = self._assets.get(name)
        if data is None:
            raise ApiError(404, "not_found", "the page has no such asset")
        is_current = call.request.path_params["version"] == self._version
        headers = {"Cache-Control": "public, max-age=31536000, immutable" if is_current else "no-cache"}
        return Response(data, media_type=_MEDIA_TYPES[Path(name).suffix], headers=headers)


#: Path of a request's waterfall, as the page links to it.
TRACE_PATH = "/traces/{request_id}"
#: Allows inline styles, which the waterfall uses.
TRACE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"


class TracePages:
    """Serves the waterfall of a request from span files on this machine."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def endpoints(self) -> list[Endpoint]:
        return [Endpoint("/traces/{request_id:path}", "GET", self.page)]

    async def page(self, call: Call) -> Response:
        page = await asyncio.to_thread(self._page_of, call.request.path_params["request_id"])
        if page is None:
            raise ApiError(404, "trace_not_found", "no spans of this request in the span files; was it sampled?")
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": TRACE_POLICY})

    def _page_of(self, request_id: str) -> str | None:
        paths = [path for name in self._files for path in (predecessor_of(name), name) if path.exists()]
        waterfall = waterfall_of(read_spans(paths).spans, request_id)
        return None if waterfall is None else page_of(waterfall)
