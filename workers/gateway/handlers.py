"""The handlers of the gateway's routes: they read the bodies of requests and return the answers.

Knows HTTP and JSON; rankings, searches and images are decided elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import orjson
from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response

from protocols.events import ImageNew
from protocols.fields import MAX_METADATA_VALUE_CHARS
from workers.gateway.app import Call, Endpoint, JsonResponse
from workers.gateway.bodies import AcceptedImage, ImageBody, ImagesAccepted, SearchBody
from workers.gateway.calls import DocumentKind
from workers.gateway.dialects import checked_id, dialect_of, parse_object, read_call, render, validated
from workers.gateway.errors import ApiError, Unanswered
from workers.gateway.images import Images, image_id_of
from workers.gateway.reranking import Reranking
from workers.gateway.searching import IndexSearch, Searching

#: Most uploads read at once; each may take `GATEWAY_MAX_UPLOAD_BYTES` of memory.
MAX_UPLOADS = 4
MAX_FILES = 50
MAX_FIELDS = 10
MAX_FIELD_BYTES = 64 << 10
#: Clients cache thumbnails for a day: a thumbnail changes only with its image.
THUMBNAIL_CACHE = "private, max-age=86400"

RERANK_PATHS = ("/v2/rerank", "/v1/rerank", "/rerank", "/openai/v1/rerank")


class Handlers:
    """The handlers of one replica."""

    def __init__(
        self,
        *,
        reranking: Reranking,
        searching: Searching | None,
        index: IndexSearch | None,
        images: Images,
        documents: DocumentKind,
        max_documents: int,
        max_upload_bytes: int,
        openapi: Mapping[str, Any],
        info: Mapping[str, Any],
    ) -> None:
        self._reranking = reranking
        self._searching = searching
        self._index = index
        self._images = images
        self._documents = documents
        self._max_documents = max_documents
        self._max_upload_bytes = max_upload_bytes
        self._openapi = orjson.dumps(openapi)
        self._info = info
        self._uploads = asyncio.Semaphore(MAX_UPLOADS)

    def endpoints(self) -> list[Endpoint]:
        """Return the endpoints of the APIs."""
        return [
            *(Endpoint(path, "POST", self.rerank) for path in RERANK_PATHS),
            Endpoint("/v1/search", "POST", self.search),
            Endpoint("/v1/images", "POST", self.publish_images, max_body_bytes=self._max_upload_bytes),
            Endpoint("/v1/images/{image_id:path}/thumbnail", "GET", self.thumbnail),
            Endpoint("/v1/images/{image_id:path}", "GET", self.image_state),
            Endpoint("/v1/images/{image_id:path}", "DELETE", self.remove_image),
            Endpoint("/v1/info", "GET", self.info),
            Endpoint("/openapi.json", "GET", self.openapi, is_open=True),
        ]

    async def rerank(self, call: Call) -> Response:
        given = parse_object(await call.body())
        read = read_call(given, strings_are=self._documents, max_documents=self._max_documents)
        answer = await self._reranking.rerank(read, request_id=call.request_id(), trace=call.trace)
        call.degraded = answer.degraded
        body = render(dialect_of(given), call.request.url.path, read, answer)
        return JsonResponse(body, headers={"Edje-Request-Id": answer.request_id})

    async def search(self, call: Call) -> Response:
        if self._searching is None:
            raise ApiError(404, "no_search", "this gateway has no index of images (GATEWAY_SEARCH=false)")
        body = validated(SearchBody, parse_object(await call.body()))
        answer = await self._searching.search(body, request_id=call.request_id(), trace=call.trace)
        call.degraded = answer.degraded
        return JsonResponse(answer.model_dump(mode="json"), headers={"Edje-Request-Id": answer.id})

    async def publish_images(self, call: Call) -> Response:
        if self._uploads.locked():
            raise ApiError(429, "too_many_uploads", "other uploads are being read; try again", {"Retry-After": "1"})
        async with self._uploads:
            body = await call.body()
            if call.request.headers.get("content-type", "").startswith("multipart/form-data"):
                images = await self._uploaded(call, body)
            else:
                images = [_described(validated(ImageBody, parse_object(body)))]
            for image in images:
                await self._images.publish(image, call.trace.outgoing()[0])
        accepted = ImagesAccepted(images=[AcceptedImage(image_id=image.image_id) for image in images])
        return JsonResponse(accepted.model_dump(mode="json"), 202)

    async def _uploaded(self, call: Call, body: bytes) -> list[ImageNew]:
        """Return the images of a multipart form: the files of any field, and the fields `image_id` and `metadata`."""

        async def stream() -> AsyncGenerator[bytes, None]:
            yield body

        parser = MultiPartParser(
            call.request.headers, stream(), max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
        )
        try:
            form = await parser.parse()
        except (MultiPartException, MultipartParseError, KeyError, ValueError) as error:
            raise ApiError(400, "not_multipart", f"the form cannot be read: {error}") from None
        try:
            files = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
            image_id, metadata = form.get("image_id"), form.get("metadata")
            if not files:
                raise ApiError(422, "no_file", "the form has no file")
            if image_id is not None and len(files) > 1:
                raise ApiError(422, "invalid_request", "image_id: allowed only with a single file")
            described = parse_object(metadata.encode()) if isinstance(metadata, str) else {}
            contents = [(file.filename, await file.read()) for file in files]
        finally:
            await form.close()
        return [_from_file(name, data, image_id, described) for name, data in contents]

    async def image_state(self, call: Call) -> Response:
        state = await self._images.state_of(_image_id(call))
        return JsonResponse(state.model_dump(mode="json", exclude_none=True))

    async def remove_image(self, call: Call) -> Response:
        await self._images.remove(_image_id(call), call.trace.outgoing()[0])
        return Response(status_code=202)

    async def thumbnail(self, call: Call) -> Response:
        file, media_type = await self._images.thumbnail(_image_id(call))
        return Response(file, media_type=media_type, headers={"Cache-Control": THUMBNAIL_CACHE})

    async def info(self, call: Call) -> Response:
        body = dict(self._info)
        if self._index is not None:
            try:
                body["num_images"] = await self._index.count()
            except Unanswered as why:
                body["problem"] = why.message
        return JsonResponse(body)

    async def openapi(self, call: Call) -> Response:
        return Response(self._openapi, media_type="application/json")


def _image_id(call: Call) -> str:
    return checked_id(call.request.path_params["image_id"], "the path")


def _described(body: ImageBody) -> ImageNew:
    if (body.uri is None) == (body.data is None):
        raise ApiError(422, "invalid_request", "exactly one of uri and data is needed")
    content = body.data if body.data is not None else body.uri or ""
    metadata = dict(body.metadata)
    if body.uri is not None and len(body.uri) <= MAX_METADATA_VALUE_CHARS:
        metadata.setdefault("uri", body.uri)  # lets documents name images by address
    image_id = body.image_id or image_id_of(content)
    return ImageNew(image_id=image_id, uri=body.uri, data=body.data, metadata=metadata or None)


def _from_file(name: str | None, data: bytes, image_id: object, described: Mapping[str, Any]) -> ImageNew:
    if not data:
        raise ApiError(422, "empty_file", f"the file {name!r} is empty")
    chosen = checked_id(image_id, "image_id") if isinstance(image_id, str) else image_id_of(data)
    metadata = {**({"name": name[:256]} if name else {}), **described}
    body = validated(ImageBody, {"image_id": chosen, "metadata": metadata})
    return ImageNew(image_id=chosen, data=data, metadata=dict(body.metadata) or None)
