"""What can go wrong in a worker, by remedy.

    WorkerError
      Transient      the world was not ready: the same message again, later
      Poison         this message can never succeed: dead letter, and on with the work
        Refused      the broker will never take this message; another may be published in its place
          TooLarge      because of its size
          TopicRefused  because its topic does not exist, or is not this worker's to write to
      Misconfigured  no message can succeed until somebody changes a setting: end the process with the sentence

Anything else is a bug or broken hardware and ends the process with its traceback.
Foreign errors become one of these in the adapter that meets them, and nowhere else.
"""

from __future__ import annotations


class WorkerError(Exception):
    """Root of the errors a worker has a remedy for."""


class Transient(WorkerError):
    """The world was not ready: try the same message again."""


class Poison(WorkerError):
    """This message can never succeed: dead-letter it and go on.

    `code` is the stable word that replies, dead letters and metrics carry.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Refused(Poison):
    """The broker refuses a message for good; `message_number` says which of those given together."""

    def __init__(self, code: str, message: str, message_number: int = 0) -> None:
        super().__init__(code, message)
        self.message_number = message_number


class TooLarge(Refused):
    """The broker refuses a message of this size."""

    def __init__(self, message: str, message_number: int = 0) -> None:
        super().__init__("too_large", message, message_number)


class TopicRefused(Refused):
    """The topic of a message does not exist, or does not take this message, or none of this worker's."""

    def __init__(self, message: str, message_number: int = 0) -> None:
        super().__init__("topic_refused", message, message_number)


class Misconfigured(WorkerError):
    """A setting, credential or permission is wrong; only a person can mend it."""
