"""Small CLIP and T5 text encoders with random weights and real tokenizers, saved as the transformers library saves them."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

WIDTH, TOKENS = 64, 16


def make(kind: str, folder: Path, seed: int = 0, **changed: int) -> Path:
    """A folder with model and tokenizer; `changed` settings of the model."""
    torch.manual_seed(seed)
    if kind == "clip":
        letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
        pairs = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("ci", "r"), ("s", "q")]
        merged = [one + other for one, other in pairs]
        pieces = [*letters, *merged, "<|startoftext|>", "<|endoftext|>"]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        CLIPTokenizer(vocab=vocabulary, merges=pairs).save_pretrained(folder)
        last = len(vocabulary) - 1
        sizes = {
            "vocab_size": len(vocabulary), "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": TOKENS, "projection_dim": 32,
            "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last,
        }  # fmt: skip
        CLIPTextModel(CLIPTextConfig(**{**sizes, **changed})).save_pretrained(folder)
        return folder
    words = ["▁", "▁red", "▁blue", "▁circle", "▁square", "▁a", *string.ascii_lowercase]
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    scored += [(word, -float(len(words) - number)) for number, word in enumerate(words)]
    T5Tokenizer(vocab=scored, extra_ids=0).save_pretrained(folder)
    sizes = {
        "vocab_size": len(scored),
        "d_model": WIDTH,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
    }
    T5EncoderModel(T5Config(**{**sizes, **changed}, feed_forward_proj="gated-gelu")).save_pretrained(folder)
    return folder
