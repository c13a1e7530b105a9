"""The errors of a worker, grouped by remedy.

    WorkerError
      Transient      a service was not ready: try the same message again, later
      Poison         this message can never succeed: publish a dead letter, and go on
        Internal       an unexpected exception while one message was handled; its traceback is in the log
        Refused        the broker never accepts this message; another may be published in its place
          TooLarge       the message is larger than the broker accepts
          TopicRefused   the topic does not exist, or this worker may not write to it
      Misconfigured  no message can succeed until a person changes a setting: the process ends and logs the message

Any other exception while one message is decoded, fetched or prepared becomes `Internal` (`as_internal_error`). Only the
engine, the ledger and the loop end the process with a traceback. Foreign errors become one of these in the adapter that
calls the foreign code, and nowhere else.
"""

from __future__ import annotations

import uuid

import structlog

log = structlog.get_logger(__name__)


class WorkerError(Exception):
    """Root of the errors that have a remedy."""


class Transient(WorkerError):
    """A service was not ready: try the same message again."""


class Poison(WorkerError):
    """This message can never succeed: publish a dead letter and go on.

    `code` is the stable error code in replies, dead letters and metrics.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Internal(Poison):
    """An unexpected exception while one message was handled; `reference` finds its traceback in the log."""

    def __init__(self, reference: str, error_class: str) -> None:
        super().__init__("internal_error", f"an unexpected {error_class}; the worker's log has it under {reference}")
        self.reference = reference


class Refused(Poison):
    """The broker never accepts a message; `message_number` is its index among those published together."""

    def __init__(self, code: str, message: str, message_number: int = 0) -> None:
        super().__init__(code, message)
        self.message_number = message_number


class TooLarge(Refused):
    """The message is larger than the broker accepts."""

    def __init__(self, message: str, message_number: int = 0) -> None:
        super().__init__("too_large", message, message_number)


class TopicRefused(Refused):
    """The topic of a message does not exist, does not accept this message, or may not be written to by this worker."""

    def __init__(self, message: str, message_number: int = 0) -> None:
        super().__init__("topic_refused", message, message_number)


class Misconfigured(WorkerError):
    """A setting, credential or permission is wrong; only a person can correct it."""


def as_internal_error(error: BaseException, **ids: object) -> Poison:
    """Return the error of one message for an exception raised while it was handled; log an unexpected one.

    A `Poison` is returned unchanged. `ids` (request_id, image_id, partition, offset…) go into the log line.
    """
    if isinstance(error, Poison):
        return error
    reference = uuid.uuid4().hex[:12]
    log.error("unexpected error while a message was handled", reference=reference, exc_info=error, **ids)
    internal = Internal(reference, type(error).__name__)
    internal.__cause__ = error
    return internal
