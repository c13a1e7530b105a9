"""The authors' network, built from modules of transformers and torch, with tiny sizes and random weights.

Uses nothing of `edje`: the tests compare the scores of converted checkpoints with it.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.bert.modeling_bert import BertPooler

IMAGE = "<image>"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "runs", "sleeps", "on", "the", "beach", "##s"]
VOCABULARY = WORDS + [each for letter in "bcdefghijk" for each in (letter, f"##{letter}")]
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOWER_HEADS, JOINT_HEADS = 4, 3
IMAGE_SIZE, PATCH_SIZE, NUM_PATCHES = 32, 8, 16


class Compression(nn.Module):
    """Learned queries, projections of keys and values, torch's attention, and an MLP with a residual connection."""

    def __init__(self, dim: int, num_queries: int, out_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, num_queries, dim))
        self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attention = nn.MultiheadAttention(dim, TOWER_HEADS, batch_first=True)
        self.layernorm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 56), "fc2": nn.Linear(56, dim)})
        self.projection = nn.Linear(dim, out_dim)

    def forward(self, patches: Tensor) -> Tensor:
        queries = self.query.repeat(len(patches), 1, 1)
        hidden, _ = self.attention(queries, self.key(patches), self.value(patches))
        hidden = hidden + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.layernorm(hidden))))
        return self.projection(hidden)


class AuthorsModel(nn.Module):
    """All modules of their `.pth` file, including the first stage and the layers of the losses."""

    def __init__(self, adapter: str, num_queries: int = 6, seed: int = 0) -> None:
        super().__init__()
        bert = BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=JOINT_HEADS,
            intermediate_size=40,
            max_position_embeddings=96,
        )
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        vision = SiglipVisionConfig(**TOWER, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
        self.num_visual = NUM_PATCHES if adapter == "local" else num_queries
        self.vision_encoder = SiglipVisionModel(vision)
        self.clip = SiglipModel(
            SiglipConfig(
                text_config=SiglipTextConfig(**text, vocab_size=20, projection_size=32).to_dict(),
                vision_config=vision.to_dict(),
            )
        )
        self.language_model = BertForMaskedLM(bert)
        self.language_model.resize_token_embeddings(len(VOCABULARY) + 1, mean_resizing=False)
        self.text_embeddings = self.language_model.get_input_embeddings()
        self.vision_projection = (
            nn.Sequential(nn.Linear(32, 56), nn.GELU(), nn.Linear(56, 24))
            if adapter == "local"
            else Compression(32, num_queries, 24)
        )
        self.classification_head = nn.Sequential(BertPooler(bert), nn.Linear(24, 1))
        self.text_projection = nn.Linear(24, 16)
        self.tokenizer = pair_tokenizer(self.num_visual)
        self.eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            parameter.normal_(0, 0.3, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter += 1

    def forward(self, pixels: Tensor, captions: list[str]) -> Tensor:  # uint8 (B, 3, H, W) -> (B,)
        """Return one logit for each pair of caption and image."""
        seen = self.vision_encoder(pixel_values=(pixels / 255 - 0.5) / 0.5).last_hidden_state
        visual = self.vision_projection(seen)
        pairs = self.tokenizer.encode_batch([(canonical(each), IMAGE * self.num_visual) for each in captions])
        ids = torch.tensor([pair.ids for pair in pairs])
        embedded = self.text_embeddings(ids)
        embedded[ids == len(VOCABULARY)] = visual.flatten(0, 1)
        read = self.language_model(
            inputs_embeds=embedded,
            token_type_ids=torch.tensor([pair.type_ids for pair in pairs]),
            attention_mask=torch.tensor([pair.attention_mask for pair in pairs]),
            output_hidden_states=True,
        )
        return self.classification_head(read.hidden_states[-1])[:, 0]

    def weights(self) -> dict[str, Tensor]:
        """Return the state dictionary with the names of transformers 4, which wrote the authors' files."""
        tower = "vision_encoder."
        inner = f"{tower}vision_model."
        return {
            name.replace(tower, inner, 1) if name.startswith(tower) and not name.startswith(inner) else name: tensor
            for name, tensor in self.state_dict().items()
        }


def canonical(caption: str) -> str:
    return "".join(each for each in caption.lower() if each not in string.punctuation)


def pair_tokenizer(num_visual: int) -> Tokenizer:
    """Encode a pair of texts with BERT's tokenizer over the small vocabulary, as in training."""
    tokenizer = Tokenizer(WordPiece({word: number for number, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens([*WORDS[:5], IMAGE])
    tokenizer.enable_truncation(max_length=64 + num_visual, strategy="only_first")
    tokenizer.enable_padding()
    return tokenizer


def write_vocabulary(path: Path) -> Path:
    path.write_text("\n".join(VOCABULARY) + "\n")
    return path
