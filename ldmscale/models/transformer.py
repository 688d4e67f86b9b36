"""Attention over the positions of a feature map: spatial transformer (with a context), plain block (without).

Rombach et al. 2022, appendix E.2.1. The 1x1 projections are linear layers on tokens: the same arithmetic as
1x1 convolutions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldmscale.models.attention import MultiHeadAttention, attention, joint_products
from ldmscale.models.layers import NORM_GROUPS, GroupNorm, LayerNorm, ZeroLinear
from ldmscale.models.recompute import geglu, geglu_linear


def tokens_of(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C], contiguous: a linear layer adds its bias within the matrix product only then."""
    return x.flatten(2).transpose(1, 2).contiguous()


def map_of(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H W, C] -> [B, C, H, W]."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)


class GatedFeedForward(nn.Module):
    """Widens four-fold with GEGLU (Shazeer 2020, erf GELU, value first and gate second) and comes back."""

    def __init__(self, width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, 8 * width)
        self.proj_out = GatedLinear(4 * width, width, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.proj_out(self.proj_in(x))  # [B, L, C]
        return result


class GatedLinear(nn.Linear):
    """GEGLU and the linear layer after it: [..., 2 D] -> [..., C]. One module, so that nothing between them is kept."""

    def __init__(self, inputs: int, outputs: int, *, dropout: float) -> None:
        super().__init__(inputs, outputs)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            return super().forward(F.dropout(geglu(x), self.dropout))
        return geglu_linear(x, self.weight, self.bias)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each normalised first and added to its input."""

    def __init__(
        self, width: int, *, heads: int, head_channels: int, context_dim: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = MultiHeadAttention(width, heads=heads, head_channels=head_channels, dropout=dropout)
        self.norm2 = LayerNorm(width)
        self.attn2 = MultiHeadAttention(
            width, heads=heads, head_channels=head_channels, context_width=context_dim, dropout=dropout
        )
        self.norm3 = LayerNorm(width)
        self.ff = GatedFeedForward(width, dropout=dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, L, C], context [B, M, K] -> [B, L, C]."""
        x = x + self.attn1(self.norm1(x))  # [B, L, C]
        x = x + self.attn2(self.norm2(x), context)  # [B, L, C]
        x = x + self.ff(self.norm3(x))  # [B, L, C]
        return x


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the positions of a feature map, added to it; starts as the identity."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_channels: int,
        context_dim: int,
        depth: int = 1,
        dropout: float = 0.0,
        norm_groups: int = NORM_GROUPS,
    ) -> None:
        super().__init__()
        inner = heads * head_channels
        self.norm = GroupNorm(channels, eps=1e-6, groups=norm_groups)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                inner, heads=heads, head_channels=head_channels, context_dim=context_dim, dropout=dropout
            )
            for _ in range(depth)
        )
        self.proj_out = ZeroLinear(inner, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], context [B, M, K] -> [B, C, H, W]."""
        if context is None:
            raise ValueError("this network was built with context_dim and was called without a context")
        tokens = self.proj_in(tokens_of(self.norm(x)))  # [B, H W, inner]
        for block in self.transformer_blocks:
            tokens = block(tokens, context)  # [B, H W, inner]
        return x + map_of(self.proj_out(tokens), x.shape[2], x.shape[3])  # [B, C, H, W]


class SpatialAttention(nn.Module):
    """Self-attention over the positions of a feature map, added to it.

    The attention of unconditional U-Nets (`eps` 1e-5, `zero_last`) and of the autoencoders (one head, `eps`
    1e-6).
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        eps: float,
        zero_last: bool = False,
        norm_groups: int = NORM_GROUPS,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = GroupNorm(channels, eps=eps, groups=norm_groups)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = ZeroLinear(channels, channels) if zero_last else nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]. A context is refused: there is nothing here that reads it."""
        if context is not None:
            raise ValueError("this network was built without context_dim and was called with a context")
        tokens = tokens_of(self.group_norm(x))  # [B, H W, C]
        q, k, v = joint_products(
            tokens, (self.to_q, self.to_k, self.to_v), self.heads
        )  # [B, H W, heads, D] each
        out = self.to_out(attention(q, k, v).flatten(2))  # [B, H W, C]
        return x + map_of(out, x.shape[2], x.shape[3])  # [B, C, H, W]
