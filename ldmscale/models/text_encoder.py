"""The text transformer that the released text-to-image models train together with the U-Net.

Rombach et al. 2022, appendix E.2.1 and table 17: token and position vectors, pre-norm self-attention and
feed-forward layers, a final norm; no attention mask (padding tokens take part, as they did in training). The
1.45B model counts this network as 581,994,042 parameters. That includes a head over the vocabulary of
39,098,682 parameters which never received a gradient and which nothing reads; it is left out here, so this
class has 542,895,360.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmscale.models.attention import MultiHeadAttention
from ldmscale.models.layers import (
    Checkpointing,
    LayerNorm,
    SmallNormalEmbedding,
    check_checkpointing,
    dropout_layer,
    run_block,
)


class TextLayer(nn.Module):
    """Self-attention, then two linear layers round an erf GELU; each normalised first, added to its input."""

    def __init__(
        self, width: int, *, heads: int, head_channels: int, feedforward_mult: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attn_layer_norm = LayerNorm(width)
        self.self_attn = MultiHeadAttention(width, heads=heads, head_channels=head_channels, dropout=dropout)
        self.final_layer_norm = LayerNorm(width)
        self.fc1 = nn.Linear(width, feedforward_mult * width)
        self.dropout = dropout_layer(dropout)
        self.fc2 = nn.Linear(feedforward_mult * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = x + self.self_attn(self.self_attn_layer_norm(x))  # [B, L, D]
        inner = self.dropout(F.gelu(self.fc1(self.final_layer_norm(x))))  # [B, L, mult D]
        x = x + self.fc2(inner)  # [B, L, D]
        return x


class TextTransformer(nn.Module):
    """Token ids to one vector a token.

    Args:
        vocab_size: rows of the token table.
        max_tokens: longest sequence; shorter ones are accepted.
        width: D. heads x head_channels need not equal it (released: 8 x 64 at width 1280).
        feedforward_mult: inner width of the feed-forward layers, in widths.
        checkpointing: "full" keeps only the inputs of the layers for the backward pass,
            "selective" the results of attention too.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_tokens: int,
        width: int,
        layers: int,
        heads: int,
        head_channels: int,
        feedforward_mult: int = 4,
        dropout: float = 0.0,
        checkpointing: Checkpointing = "off",
    ) -> None:
        super().__init__()
        check_checkpointing(checkpointing)
        self.checkpointing: Checkpointing = checkpointing
        self.max_tokens = max_tokens
        self.width = width
        self.embed_tokens = SmallNormalEmbedding(vocab_size, width)
        self.embed_positions = SmallNormalEmbedding(max_tokens, width)
        self.layers = nn.ModuleList(
            TextLayer(
                width,
                heads=heads,
                head_channels=head_channels,
                feedforward_mult=feedforward_mult,
                dropout=dropout,
            )
            for _ in range(layers)
        )
        self.layer_norm = LayerNorm(width)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [B, L] int64, L <= max_tokens -> [B, L, D]."""
        length = token_ids.shape[1]
        if length > self.max_tokens:
            raise ValueError(f"the captions have {length} tokens, this text encoder takes {self.max_tokens}")
        positions = torch.arange(length, device=token_ids.device)  # [L]
        x = self.embed_tokens(token_ids) + self.embed_positions(positions)  # [B, L, D]
        for layer in self.layers:
            x = run_block(layer, self.checkpointing, x)  # [B, L, D]
        result: Tensor = self.layer_norm(x)  # [B, L, D]
        return result
