"""Other implementations to compare with, in the shape of the timed engines: MiniLM-L12, random weights.

Reimplements what the authors' released code and sentence-transformers do with a pair; of theirs, only the
libraries run.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertTokenizerFast

VOCAB_SIZE = 30_523
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def bert_config(**changes: object) -> BertConfig:
    """MiniLM-L12-H384-uncased."""
    return BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=1536,
        **changes,
    )


class AuthorsWay(nn.Module):
    """A masked-language model over caption and visual tokens; its unused vocabulary head runs too."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = BertForMaskedLM(bert_config())
        self.head = nn.Sequential(nn.Linear(384, 384), nn.Tanh(), nn.Linear(384, 1))

    @torch.inference_mode()
    def score(self, text_ids: Tensor, visual: Tensor) -> Tensor:  # (B, T), (B, m, d) -> (B,)
        words = self.language_model.bert.embeddings.word_embeddings
        last = words(text_ids[:, -1:])
        embedded = torch.cat((words(text_ids), visual.to(last.dtype), last), dim=1)
        types = torch.zeros(embedded.shape[:2], dtype=torch.long)
        types[:, text_ids.shape[1] :] = 1
        read = self.language_model(
            inputs_embeds=embedded,
            token_type_ids=types,
            attention_mask=torch.ones_like(types),
            output_hidden_states=True,
        )
        return self.head(read.hidden_states[-1][:, 0])[:, 0]


def text_cross_encoder(folder: Path, num_tokens: int) -> tuple[CrossEncoder, tuple[str, str]]:
    """Return a CrossEncoder and a pair of texts with `num_tokens` tokens, special tokens included."""
    vocabulary = [*SPECIALS, *(f"w{number}" for number in range(VOCAB_SIZE - len(SPECIALS)))]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(vocabulary)})
    BertForSequenceClassification(bert_config(num_labels=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    random = np.random.default_rng(0)
    words = [f"w{number}" for number in random.integers(0, 30_000, num_tokens - 3)]
    pair = (" ".join(words[:15]), " ".join(words[15:]))
    found = len(tokenizer(*pair)["input_ids"])
    if found != num_tokens:
        raise SystemExit(f"the CrossEncoder's pair has {found} tokens, not {num_tokens}")
    return CrossEncoder(str(folder), device="cpu"), pair
