"""Encodes captions and queries as token ids, as the checkpoint's model was trained to read them.

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

#: An underscore becomes a space; all other punctuation is removed.
_PUNCTUATION = str.maketrans({"_": " "} | dict.fromkeys(string.punctuation.replace("_", "")))
#: Text beyond this many characters for each allowed word piece is ignored. Word pieces are rarely that long, and a huge
#: text then takes no more time than a long one.
_MAX_CHARS_PER_PIECE = 64


def canonical_caption(text: str) -> str:
    """The text in lower case without ASCII punctuation, its words separated by single spaces."""
    return " ".join(text.translate(_PUNCTUATION).lower().split())


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Token ids of a text with [CLS] and [SEP], and the completeness of their representation of the text."""

    ids: tuple[int, ...]
    num_unknown: int  # word pieces that are not in the vocabulary
    is_cut: bool  # the end of the text is not in the ids

    @property
    def num_pieces(self) -> int:
        """The number of ids without [CLS] and [SEP]."""
        return len(self.ids) - 2

    def is_understood(self, text: str) -> bool:
        """Whether a word piece of `text`, which gave these ids, is in the vocabulary and is more than punctuation.

        False for spaces, `???`, an emoji or an unknown script.
        """
        return self.num_unknown < self.num_pieces and any(map(str.isalnum, text))


class Tokenizer:
    """Encodes text as `[CLS] word pieces [SEP]`, cut to the joint encoder's limit. Thread-safe."""

    def __init__(self, tokenizer_json: str, config: EdjeConfig) -> None:
        self._tokenizer = _Tokenizer.from_str(tokenizer_json)
        # A caption that contains "[SEP]" as text must not produce the special token.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length=config.preprocess.max_text_tokens)
        #: -1, which is no id, for a vocabulary without [UNK].
        self._unknown_id = -1 if (unknown := self._tokenizer.token_to_id("[UNK]")) is None else unknown
        self._canonical = config.preprocess.canonical_captions
        self.max_text_tokens = config.preprocess.max_text_tokens
        self._max_chars = _MAX_CHARS_PER_PIECE * config.preprocess.max_caption_pieces
        if self._tokenizer.token_to_id("[SEP]") != config.joint.sep_id:
            raise CheckpointMismatch(
                f"the tokenizer's [SEP] is token {self._tokenizer.token_to_id('[SEP]')}, "
                f"the model's is {config.joint.sep_id}: tokenizer.json belongs to another model"
            )
        if self._tokenizer.get_vocab_size() > config.joint.vocab_size:
            raise CheckpointMismatch(
                f"the tokenizer has {self._tokenizer.get_vocab_size()} tokens, "
                f"the model {config.joint.vocab_size}: tokenizer.json belongs to another model"
            )

    @classmethod
    def load(cls, checkpoint: Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder. Raises `CheckpointError`."""
        return cls(read_tokenizer_json(checkpoint), read_config(checkpoint))

    def token_id(self, token: str) -> int:
        """The id of a token such as [MASK]. Raises `CheckpointMismatch` if it is not in the vocabulary."""
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise CheckpointMismatch(f"the tokenizer has no token {token}: it was made for another kind of model")
        return int(number)

    def encode(self, text: str) -> list[int]:
        """Ids with [CLS] and [SEP], at most `max_text_tokens`; only word pieces are cut off."""
        return self._tokenizer.encode(self.normalise(text)).ids

    def encode_batch(self, texts: Sequence[str]) -> list[EncodedText]:
        """Encode many texts as `encode` does. Other threads run meanwhile."""
        encodings = self._tokenizer.encode_batch([self.normalise(text) for text in texts])
        return [
            EncodedText(
                ids=tuple(encoding.ids),
                num_unknown=encoding.ids.count(self._unknown_id),
                is_cut=bool(encoding.overflowing) or len(text) > self._max_chars,
            )
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of a text and, for each, the positions of its pieces among the ids ([CLS] is 0)."""
        normalised = self.normalise(text)
        encoding = self._tokenizer.encode(normalised)
        words: dict[int, tuple[int, int, list[int]]] = {}  # by number: first character, last character, positions
        for position, (number, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
            if number is not None:
                first, _, positions = words.get(number, (start, end, []))
                words[number] = (first, end, [*positions, position])
        return [(normalised[start:end], positions) for start, end, positions in words.values()]

    def normalise(self, text: str) -> str:
        """The text that is split into word pieces: shortened, valid Unicode, and canonical if the model requires it."""
        text = _valid_unicode(text[: self._max_chars])
        return canonical_caption(text) if self._canonical else text

    def token_positions(self, text: str, chars: Iterable[int]) -> list[int | None]:
        """The positions among the ids ([CLS] is 0) of the pieces that hold these characters of `normalise(text)`.

        None for a character that was cut off.
        """
        encoding = self._tokenizer.encode(self.normalise(text))
        return [encoding.char_to_token(char) for char in chars]


def _valid_unicode(text: str) -> str:
    """The text with each unpaired surrogate (half an emoji, from JSON) replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
