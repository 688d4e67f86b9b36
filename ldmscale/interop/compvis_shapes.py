"""What the tensors of a CompVis checkpoint say of its architecture: everything but the number of heads.

The names handed in are without CompVis' prefixes. A checkpoint that is not whole still gets a configuration wherever
its first tensors allow one, so that the comparison with it names all that is missing at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldmscale.config import AutoencoderConfig, ImportedUNetConfig, TextEncoderConfig
from ldmscale.errors import DataError

Found = Mapping[str, Tensor]
HEADS = (
    "{part}.heads is not known: the shapes of a checkpoint do not tell it; give {part}=NAME of its configuration in conf/, "
    "{part}.heads=N{or_size}"
)
UNET_HEADS = HEADS.format(
    part="unet", or_size=" or unet.head_channels=N, or config=FILE, the yaml that CompVis publishes with it"
)
TEXT_HEADS = HEADS.format(part="text_encoder", or_size=" and text_encoder.head_channels=N")
HALVINGS = (
    "the number of halvings of the map is not known: the shapes of a checkpoint do not tell it; give spatial=NAME of its "
    "configuration in conf/, or config=FILE, the yaml that CompVis publishes with it"
)
# BERTEmbedder has no setting for its heads: x-transformers' defaults.
BERT_HEADS, BERT_HEAD_CHANNELS = 8, 64


def multiples(widths: list[int]) -> tuple[float, ...]:
    """Widths of levels as factors of the first convolution's width, whole numbers where they are."""
    channels, *levels = widths
    return tuple(w // channels if w % channels == 0 else w / channels for w in levels)


def infer_unet(found: Found, heads: int | None, head_channels: int | None) -> ImportedUNetConfig:
    """The U-Net that has these tensors. Raises DataError naming the tensor without which nothing can be said."""
    first, last = _shape(found, "input_blocks.0.0.weight"), _shape(found, "out.2.weight")
    ups = sorted(
        int(m[1])
        for name in found
        if (m := re.match(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.0)\.weight$", name))
    )
    outputs = _count(found, r"output_blocks\.(\d+)\.")
    blocks = ups[0] if ups else outputs - 1
    levels = max(1, outputs // (blocks + 1))
    starts = [1 + level * (blocks + 1) for level in range(levels)]
    widths = [_shape(found, f"input_blocks.{i}.0.out_layers.0.weight")[0] for i in starts]
    depth = _count(found, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    context = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    return ImportedUNetConfig(
        in_channels=first[1],
        out_channels=last[0],
        channels=first[0],
        channel_mult=multiples([first[0], *widths]),
        blocks_per_level=blocks,
        attention_levels=tuple(
            level for level, i in enumerate(starts) if f"input_blocks.{i}.1.norm.weight" in found
        ),
        heads=heads,
        head_channels=head_channels,
        context_dim=_shape(found, context)[1] if depth else None,
        transformer_depth=max(1, depth),
        residual_updown=any(
            f"output_blocks.{i}.{j}.in_layers.0.weight" in found for i in ups for j in (1, 2)
        ),
        scale_shift_norm=_shape(found, "middle_block.0.emb_layers.1.weight")[0]
        == 2 * _shape(found, "middle_block.0.out_layers.0.weight")[0],
        num_classes=_shape(found, "label_emb.weight")[0] if "label_emb.weight" in found else None,
    )


def infer_autoencoder(found: Found) -> AutoencoderConfig:
    """The autoencoder that has these tensors. Raises DataError like `infer_unet`."""
    first = _shape(found, "encoder.conv_in.weight")
    levels = _count(found, r"encoder\.down\.(\d+)\.")
    widths = [_shape(found, f"encoder.down.{level}.block.0.norm2.weight")[0] for level in range(levels)]
    vq = "quantize.embedding.weight" in found
    features = _shape(found, "encoder.conv_out.weight")[0]
    options: dict[str, Any] = {}
    if vq:
        rows, width = _shape(found, "quantize.embedding.weight")
        options = {"codebook_size": rows, "codebook_dim": None if width == features else width}
    return AutoencoderConfig(
        kind="vq" if vq else "kl",
        latent_channels=features if vq else features // 2,
        channels=first[0],
        channel_mult=multiples([first[0], *widths]),
        blocks_per_level=_count(found, r"encoder\.down\.0\.block\.(\d+)\."),
        attention_levels=tuple(
            level for level in range(levels) if f"encoder.down.{level}.attn.0.norm.weight" in found
        ),
        mid_attention="encoder.mid.attn_1.norm.weight" in found,
        image_channels=first[1],
        **options,
    )


def infer_text_encoder(found: Found, heads: int | None, head_channels: int | None) -> TextEncoderConfig:
    """The text transformer that has these tensors; BERTEmbedder's heads unless given. Raises DataError like `infer_unet`."""
    vocabulary, width = _shape(found, "token_emb.weight")
    inner = _shape(found, "attn_layers.layers.0.1.to_q.weight")[0]
    if heads is None and head_channels is None:
        heads, head_channels = BERT_HEADS, BERT_HEAD_CHANNELS
    heads = heads or inner // (head_channels or 1)
    return TextEncoderConfig(
        kind="bert",
        tokenizer="bert-base-uncased",
        vocab_size=vocabulary,
        max_tokens=_shape(found, "pos_emb.emb.weight")[0],
        width=width,
        layers=_count(found, r"attn_layers\.layers\.(\d+)\.") // 2,
        heads=heads,
        head_channels=head_channels or inner // heads,
        feedforward_mult=_shape(found, "attn_layers.layers.1.1.net.0.0.weight")[0] // width,
    )


def has_bert_heads(found: Found) -> bool:
    """Whether the projections of a text transformer are as wide as BERTEmbedder's, whose heads are always the same."""
    return _shape(found, "attn_layers.layers.0.1.to_q.weight")[0] == BERT_HEADS * BERT_HEAD_CHANNELS


def _shape(found: Found, name: str) -> tuple[int, ...]:
    if name not in found:
        raise DataError(f"{name} is missing: without it the architecture cannot be told")
    return tuple(found[name].shape)


def _count(found: Found, pattern: str) -> int:
    return len({m[1] for name in found if (m := re.match(pattern, name))})
