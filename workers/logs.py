"""Sets up logging of this program and its libraries: one line for each event, for people or as JSON.

Modules log through `structlog.get_logger(__name__)` and pass the ids with each line
(`log.warning("…", request_id=…, trace_id=…)`), so a request that logs nothing costs nothing. Knows no setting by
name: secrets are passed as values.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from workers.secrets import SecretMask

Level = Literal["debug", "info", "warning", "error"]

#: Lowest level of libraries that log every connection, unless the level is `debug`. kafka-python warns in healthy
#: operation (`No partition metadata…`, `Task … is blocking the event loop`); the adapter logs what matters.
LIBRARY_LEVELS = {
    "kafka": logging.CRITICAL,
    **dict.fromkeys(("redis", "asyncio", "aiohttp", "fsspec", "PIL", "urllib3"), logging.WARNING),
}


def set_up_logs(
    *,
    log_format: Literal["console", "json"],
    level: Level,
    secrets: Iterable[str] = (),
    out: TextIO | None = None,
) -> None:
    """Send every log line of the process to `out` (standard error), uncaught errors included.

    `secrets` are masked wherever they occur, and so is any password in an address.
    """
    stream = out or sys.stderr
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _hiding(SecretMask(secrets)),
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=stream.isatty())
    )
    structlog.configure(
        processors=[structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            # Adds the fields that all lines share, for this program's lines and those of libraries.
            processors=[*shared, structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name, least in LIBRARY_LEVELS.items():
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else least)
    logging.captureWarnings(True)
    _log_uncaught()


def _hiding(mask: SecretMask) -> Processor:
    """Return a processor that masks the values of a line and converts them to types that every renderer can write."""

    def hidden(value: Any) -> Any:
        match value:
            case bool() | int() | None:
                return value
            case float() if math.isfinite(value):  # JSON has no NaN or infinity
                return value
            case Mapping():
                return {str(name): hidden(inner) for name, inner in value.items()}
            case list() | tuple() | set() | frozenset():
                return [hidden(inner) for inner in value]
        return mask(value if isinstance(value, str) else str(value))

    def hide(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        return {name: value if name.startswith("_") else hidden(value) for name, value in event.items()}

    return hide


def _log_uncaught() -> None:
    """Log errors that end the process or a thread, with the traceback as one field."""
    log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

    def process(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, traceback)
            return
        log.critical("the process ends by an error", exc_info=(kind, error, traceback))

    def thread(hook: threading.ExceptHookArgs) -> None:
        if hook.exc_value is not None and not issubclass(hook.exc_type, SystemExit):
            name = hook.thread.name if hook.thread else "?"
            error = (hook.exc_type, hook.exc_value, hook.exc_traceback)
            log.critical("a thread ends by an error", thread=name, exc_info=error)

    sys.excepthook = process
    threading.excepthook = thread
