"""The errors that become HTTP answers. Knows no HTTP library."""

from __future__ import annotations

from collections.abc import Mapping


class ApiError(Exception):
    """A request that is answered with an error status.

    `code` is the stable error code in answers and metrics; `message` is for the person who sent the request.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})


class Unanswered(Exception):
    """A valid request got no ranking: the reason for a degraded answer, or for an error answer.

    `status` is the status of the error answer: 504 after a timeout, 503 if a part of the service is away.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message

    def error(self) -> ApiError:
        headers = {"Retry-After": "1"} if self.status == 503 else {}
        return ApiError(self.status, self.code, self.message, headers)
