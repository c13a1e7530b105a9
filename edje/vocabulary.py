"""Creates tokenizers, in code or from a vocabulary file.

For new models only; `edje.text` reads the tokenizer of a checkpoint.
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
#: The token of a visual token in the published models; the last one of the vocabulary.
IMAGE_TOKEN = "<image>"
#: Latin, Greek and Cyrillic characters are below it. Other characters become [UNK], as in BERT.
_END_OF_ALPHABETS = 0x500
#: A rarer word is split into characters, because training sees it too seldom.
_MIN_WORD_COUNT = 5


class VocabularyError(ValueError):
    """The vocabulary file is not a BERT vocabulary."""


def character_tokenizer() -> Tokenizer:
    """A tokenizer of single characters, for models without a vocabulary."""
    normalizer = BertNormalizer(lowercase=True)
    characters = [
        character
        for character in map(chr, range(0x21, _END_OF_ALPHABETS))
        if unicodedata.category(character)[0] in "LNPS" and normalizer.normalize_str(character) == character
    ]
    return _tokenizer([*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters), IMAGE_TOKEN])


def caption_tokenizer(captions: Iterable[str]) -> Tokenizer:
    """A tokenizer of the captions' frequent words, the most frequent first, and of single ASCII letters and digits."""
    # Counted as the tokenizer splits them, without accents.
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts: Counter[str] = Counter()
    for written, count in Counter(word for caption in captions for word in canonical_caption(caption).split()).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(written)):
            counts[word] += count
    singles = string.ascii_lowercase + string.digits
    words = [word for word, count in counts.most_common() if count >= _MIN_WORD_COUNT and len(word) > 1]
    return _tokenizer([*SPECIAL_TOKENS, *singles, *(f"##{single}" for single in singles), *words, IMAGE_TOKEN])


def wordpiece_tokenizer(vocabulary: Path) -> Tokenizer:
    """A tokenizer from BERT's `vocab.txt`, one token per line; `<image>` is appended if it is missing.

    Raises `VocabularyError`.
    """
    try:
        tokens = vocabulary.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VocabularyError(f"{vocabulary} cannot be read as a vocabulary: {error}") from error
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise VocabularyError(f"{vocabulary} is not a BERT vocabulary: the tokens {', '.join(missing)} are missing")
    return _tokenizer(tokens if IMAGE_TOKEN in tokens else [*tokens, IMAGE_TOKEN])


def _tokenizer(tokens: Sequence[str]) -> Tokenizer:
    numbers = {token: number for number, token in enumerate(tokens)}
    if len(numbers) != len(tokens):
        raise VocabularyError("a token is listed twice in the vocabulary: remove one of the lines")
    tokenizer = Tokenizer(WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", numbers["[SEP]"]), ("[CLS]", numbers["[CLS]"]))
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, IMAGE_TOKEN])
    return tokenizer
