"""Encodes the texts of requests to token ids on a thread, in batches, and caches recent texts.

The loop never tokenises, because a thousand long texts take seconds. Used from the loop's thread; knows nothing of
how the ids are used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from edje.text import EncodedText
from workers.landing import Landing
from workers.rerank.fairness import FairQueue
from workers.rerank.request import Request

EncodeBatch = Callable[[Sequence[str]], Sequence[EncodedText]]

#: Most texts of one task, so that a short request waits for at most two tasks of a long one.
MAX_TASK_TEXTS = 64
MAX_TASK_CHARS = 16_384
#: One task on the thread and one waiting.
MAX_TASKS = 2


@dataclass(slots=True, eq=False)
class _Encoding:
    """A request whose texts are being encoded."""

    request: Request
    texts: list[EncodedText | None]
    num_missing: int


@dataclass(frozen=True, slots=True)
class _Task:
    """Some texts of one request, given by their indexes."""

    encoding: _Encoding
    numbers: Sequence[int]


class TextEncoder:
    """Takes requests and returns each when all its texts are encoded."""

    def __init__(
        self,
        encode_batch: EncodeBatch,
        *,
        executor: Executor,
        landing: Landing,
        cache_size: int,
    ) -> None:
        """`encode_batch` runs on `executor`, which has one thread."""
        self._encode_batch = encode_batch
        self._executor = executor
        self._landing = landing
        self._cache_size = cache_size
        self._cache: OrderedDict[str, EncodedText] = OrderedDict()  # least recently used first
        self._tasks: FairQueue[_Task] = FairQueue()
        self._num_running = 0
        self._ready: list[tuple[Request, Sequence[EncodedText]]] = []
        self._failed: list[tuple[Request, Exception]] = []

    def start(self, request: Request) -> None:
        """Encode the texts of a request."""
        texts = [self._cache.get(text) for text in request.texts]
        missing = [number for number, encoded in enumerate(texts) if encoded is None]
        encoding = _Encoding(request, texts, len(missing))
        if not missing:
            self._finish(encoding)
            return
        tasks = [_Task(encoding, numbers) for numbers in _chunks(request.texts, missing)]
        costs = [float(sum(1 + len(request.texts[number]) for number in task.numbers)) for task in tasks]
        self._tasks.push(tasks, costs, priority=request.priority)
        self._run_tasks()

    def take_ready(self) -> list[tuple[Request, Sequence[EncodedText]]]:
        """Return the requests with their encoded texts, when all are encoded."""
        ready, self._ready = self._ready, []
        return ready

    def take_failed(self) -> list[tuple[Request, Exception]]:
        """Return the requests whose texts cannot be encoded, and the exceptions."""
        failed, self._failed = self._failed, []
        return failed

    def _run_tasks(self) -> None:
        while self._num_running < MAX_TASKS and self._tasks:
            task = self._tasks.pop()
            if task.encoding.request.is_closed:
                continue
            self._num_running += 1
            texts = [task.encoding.request.texts[number] for number in task.numbers]
            self._landing.start(
                self._executor, partial(self._encode, texts), partial(self._encoded, task), partial(self._fail, task)
            )

    def _encode(self, texts: Sequence[str]) -> Sequence[EncodedText]:
        try:
            return self._encode_batch(texts)
        except Exception:
            raise
        except BaseException as error:  # a panic of the tokenizer's Rust code is not an `Exception`
            raise RuntimeError(f"the tokenizer failed: {error}") from error

    def _encoded(self, task: _Task, encoded: Sequence[EncodedText]) -> None:
        encoding = task.encoding
        self._num_running -= 1
        for number, each in zip(task.numbers, encoded, strict=True):
            encoding.texts[number] = each
            self._remember(encoding.request.texts[number], each)
        encoding.num_missing -= len(task.numbers)
        if encoding.num_missing == 0 and not encoding.request.is_closed:
            self._finish(encoding)
        self._run_tasks()

    def _fail(self, task: _Task, error: Exception) -> None:
        self._num_running -= 1
        self._failed.append((task.encoding.request, error))
        self._run_tasks()

    def _finish(self, encoding: _Encoding) -> None:
        for text in encoding.request.texts:
            if text in self._cache:
                self._cache.move_to_end(text)
        self._ready.append((encoding.request, [text for text in encoding.texts if text is not None]))

    def _remember(self, text: str, encoded: EncodedText) -> None:
        if self._cache_size:
            self._cache[text] = encoded
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)


def _chunks(texts: Sequence[str], numbers: Sequence[int]) -> list[list[int]]:
    """Split the texts with these indexes into tasks."""
    chunks: list[list[int]] = []
    num_chars = 0
    for number in numbers:
        num_chars += len(texts[number])
        if not chunks or len(chunks[-1]) >= MAX_TASK_TEXTS or num_chars > MAX_TASK_CHARS:
            chunks.append([])
            num_chars = len(texts[number])
        chunks[-1].append(number)
    return chunks


def warnings_about(request: Request, encoded: Sequence[EncodedText]) -> list[tuple[str, str]]:
    """Return a warning, as code and message, for each reason why the model can use little of the texts.

    A text is not understood if none of its pieces is known, or if it has no letter and no digit.
    """
    num_texts = len(encoded)
    understood = [each.is_understood(text) for text, each in zip(request.texts, encoded, strict=True)]
    num_cut = sum(each.is_cut for each in encoded)
    found: list[tuple[str, str]] = []
    if request.direction == "text-to-image":
        if not all(understood):
            found.append(("query_not_understood", "the model knows no word of the query: the ranking is meaningless"))
        if num_cut:
            found.append(("query_cut", "the query is longer than the model reads: its end has no influence"))
        return found
    num_not_understood = num_texts - sum(understood)
    if num_not_understood:
        found.append(
            (
                "candidates_not_understood",
                f"the model knows no word of {num_not_understood} of {num_texts} candidate texts",
            )
        )
    if num_cut:
        found.append(("candidates_cut", f"{num_cut} of {num_texts} candidate texts are longer than the model reads"))
    return found
