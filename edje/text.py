"""Captions to ids, as the checkpoint's model was trained to read them.

On the hot path of the rerank worker: imports neither torch nor the model.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from edje.checkpoint import CheckpointMismatch, read_config, read_tokenizer_json
from edje.config import EdjeConfig

#: The underscore separates words, every other mark vanishes.
_PUNCTUATION = str.maketrans({"_": " "} | dict.fromkeys(string.punctuation.replace("_", "")))


def canonical_caption(text: str) -> str:
    """Lower case without punctuation, words parted by single spaces."""
    return " ".join(text.translate(_PUNCTUATION).lower().split())


@dataclass(frozen=True, slots=True)
class EncodedText:
    """The ids of a text with [CLS] and [SEP], and how much of the text they carry."""

    ids: tuple[int, ...]
    num_unknown: int  # pieces that the vocabulary lacks
    is_cut: bool  # the end of the text is not among the ids

    @property
    def num_pieces(self) -> int:
        """The number of ids without [CLS] and [SEP]."""
        return len(self.ids) - 2


class Tokenizer:
    """Text to `[CLS] pieces [SEP]`, cut to what the joint encoder reads. Safe to call from several threads."""

    def __init__(self, tokenizer_json: str, config: EdjeConfig) -> None:
        self._tokenizer = _Tokenizer.from_str(tokenizer_json)
        # Special tokens are the model's punctuation: a caption that spells "[SEP]" must not get to use it.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length=config.preprocess.max_text_tokens)
        #: Some vocabularies lack no piece; -1 is no id.
        self._unknown_id = -1 if (unknown := self._tokenizer.token_to_id("[UNK]")) is None else unknown
        self._canonical = config.preprocess.canonical_captions
        self.max_text_tokens = config.preprocess.max_text_tokens
        #: A caption is cut to `max_caption_pieces` anyway, and a piece is rarely this long: whatever lies behind is
        #: not looked at, so that a huge text costs no more than a long one.
        self._max_chars = 64 * config.preprocess.max_caption_pieces
        if self._tokenizer.token_to_id("[SEP]") != config.joint.sep_id:
            raise CheckpointMismatch(
                f"the tokenizer's [SEP] is token {self._tokenizer.token_to_id('[SEP]')}, "
                f"the model's is {config.joint.sep_id}: tokenizer.json belongs to another model"
            )
        if self._tokenizer.get_vocab_size() > config.joint.vocab_size:
            raise CheckpointMismatch(
                f"the tokenizer knows {self._tokenizer.get_vocab_size()} tokens, "
                f"the model {config.joint.vocab_size}: tokenizer.json belongs to another model"
            )

    @classmethod
    def load(cls, checkpoint: Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder. Raises `CheckpointError` if it cannot be read."""
        return cls(read_tokenizer_json(checkpoint), read_config(checkpoint))

    def id_of(self, token: str) -> int:
        """The id of a token such as [MASK]. Raises `CheckpointMismatch` if the vocabulary lacks it."""
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise CheckpointMismatch(f"the tokenizer has no {token}: it was made for another kind of model")
        return int(number)

    def encode(self, text: str) -> list[int]:
        """Ids with [CLS] and [SEP], at most `max_text_tokens`; the caption alone is cut."""
        return self._tokenizer.encode(self.as_read(text)).ids

    def encode_batch(self, texts: Sequence[str]) -> list[EncodedText]:
        """Encode many texts as `encode` does. Other threads run meanwhile."""
        encodings = self._tokenizer.encode_batch([self.as_read(text) for text in texts])
        return [
            EncodedText(
                ids=tuple(encoding.ids),
                num_unknown=encoding.ids.count(self._unknown_id),
                is_cut=bool(encoding.overflowing) or len(text) > self._max_chars,
            )
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """Return the words of a text and, for each, the positions of its pieces among the ids ([CLS] is 0)."""
        read = self.as_read(text)
        encoding = self._tokenizer.encode(read)
        words: dict[int, tuple[int, int, list[int]]] = {}  # by number: first character, last character, positions
        for position, (number, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
            if number is not None:
                first, _, positions = words.get(number, (start, end, []))
                words[number] = (first, end, [*positions, position])
        return [(read[start:end], positions) for start, end, positions in words.values()]

    def as_read(self, text: str) -> str:
        """The text of which the pieces are made."""
        text = text[: self._max_chars]
        return canonical_caption(text) if self._canonical else text

    def pieces_at(self, text: str, chars: Iterable[int]) -> list[int | None]:
        """For characters of `as_read(text)` the place, [CLS] being 0, of the piece that holds each; None if cut off."""
        encoding = self._tokenizer.encode(self.as_read(text))
        return [encoding.char_to_token(char) for char in chars]
