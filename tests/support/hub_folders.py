"""Tiny models as folders of the hub: SigLIP and CLIP with a tokenizer, and a BERT."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from edje.vocabulary import SPECIAL_TOKENS

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}
WORDS = ("a", "plain", "picture", "in", "of", "very", *COLOURS)
IMAGE_SIZE = 16
MAX_TOKENS = 8


def write_pair_of_encoders(folder, architecture, *, has_mask=False, seed=0):
    """A SigLIP or CLIP model with random weights, and a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    import torch

    pad, end, unknown = ("<pad>", "</s>", "<unk>")
    numbers = {word: number for number, word in enumerate((pad, unknown, *WORDS, end))}
    words = Tokenizer(WordLevel(numbers, unk_token=unknown))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, numbers[end])])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        model_input_names=["input_ids", "attention_mask"] if has_mask else ["input_ids"],
    )
    sides = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **sides,
        "vocab_size": len(numbers),
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": numbers[end],
    }
    vision = {**sides, "image_size": IMAGE_SIZE, "patch_size": 4}
    torch.manual_seed(seed)
    if architecture == "siglip":
        config = transformers.SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=vision)
        model = transformers.SiglipModel(config)
    else:
        text["hidden_size"] = 24
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
        model = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": {"height": IMAGE_SIZE}})
    )
    return model, tokenizer


def write_bert(folder):
    """A BERT with random weights and the vocabulary `WORDS`."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True, exist_ok=True)
    words = [*SPECIAL_TOKENS, *WORDS]
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
    )
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def write_pictures(folder, num_images=16, num_dev=4):
    """Single-coloured pictures with a list in Karpathy's format; returns the list's path."""
    (folder / "pictures").mkdir(parents=True)
    entries = []
    for number in range(num_images):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        shade = np.clip(np.array(colour) + 2 * number, 0, 255).astype(np.uint8)
        Image.fromarray(np.broadcast_to(shade, (20, 20, 3)).copy()).save(folder / "pictures" / f"{number}.png")
        captions = [f"A plain {name} picture.", f"a picture in {'very ' * (number % 3)}{name}"]
        entries.append(
            {
                "filename": f"{number}.png",
                "imgid": number,
                "split": "val" if number < num_dev else "train",
                "sentences": [{"raw": caption} for caption in captions],
            }
        )
    path = folder / "list.json"
    path.write_text(json.dumps({"images": entries}))
    return path
