"""Tokenizers made in code or from a vocabulary file: what a checkpoint stores as `tokenizer.json`.

Only `edje.init` and training need this; reading a stored tokenizer is `edje.text`.
"""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

from edje.text import canonical_caption

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
#: Stands for a visual token where a sequence is written out; the last token, as in the published weights.
IMAGE_TOKEN = "<image>"
#: Latin, Greek and Cyrillic lie below it. Anything else becomes [UNK], as in BERT's own vocabulary.
_END_OF_ALPHABETS = 0x500
#: A word that is rarer gets no vector of its own: nothing could be learned about it.
_MIN_WORD_COUNT = 5


class VocabularyError(ValueError):
    """The vocabulary file cannot serve a BERT tokenizer."""


def character_tokenizer() -> Tokenizer:
    """Every printable character and its continuation: tokenises text without a learned vocabulary, at length."""
    normalizer = BertNormalizer(lowercase=True)
    characters = [
        character
        for character in map(chr, range(0x21, _END_OF_ALPHABETS))
        if unicodedata.category(character)[0] in "LNPS" and normalizer.normalize_str(character) == character
    ]
    return _tokenizer([*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters), IMAGE_TOKEN])


def caption_tokenizer(captions: Iterable[str]) -> Tokenizer:
    """Whole words as these captions use them, the frequent ones first, and ASCII letters and digits for all others."""
    # Counted as the tokenizer will see them: without accents, and apart where it parts them.
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts: Counter[str] = Counter()
    for written, count in Counter(word for caption in captions for word in canonical_caption(caption).split()).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(written)):
            counts[word] += count
    singles = string.ascii_lowercase + string.digits
    words = [word for word, count in counts.most_common() if count >= _MIN_WORD_COUNT and len(word) > 1]
    return _tokenizer([*SPECIAL_TOKENS, *singles, *(f"##{single}" for single in singles), *words, IMAGE_TOKEN])


def wordpiece_tokenizer(vocabulary: Path) -> Tokenizer:
    """BERT's `vocab.txt`, one token a line, with `<image>` appended where it is missing."""
    try:
        tokens = vocabulary.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VocabularyError(f"{vocabulary} cannot be read as a vocabulary: {error}") from error
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise VocabularyError(f"{vocabulary} is no BERT vocabulary: it lacks {', '.join(missing)}")
    return _tokenizer(tokens if IMAGE_TOKEN in tokens else [*tokens, IMAGE_TOKEN])


def _tokenizer(tokens: Sequence[str]) -> Tokenizer:
    numbers = {token: number for number, token in enumerate(tokens)}
    if len(numbers) != len(tokens):
        raise VocabularyError("a token occurs twice in the vocabulary")
    tokenizer = Tokenizer(WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", numbers["[SEP]"]), ("[CLS]", numbers["[CLS]"]))
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, IMAGE_TOKEN])
    return tokenizer
