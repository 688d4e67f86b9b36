"""What the diffusion stage trains: the U-Net, the text encoder that it reads, and the null condition.

One forward covers both networks, so that one engine can own them. The null condition is a named part of the
model, the same object in training (it replaces dropped captions), in sampling (the unconditional half of
guidance, Ho & Salimans 2021) and in export.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ldmscale.models.text_encoder import TextTransformer
from ldmscale.models.unet import UNet


class NullContext(nn.Module):
    """A learned context that stands for "no caption"; a module, so that ZeRO-3 gathers it when called."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self) -> Tensor:
        """[L, D]."""
        return self.weight


class TextConditionedDenoiser(nn.Module):
    """U-Net, text encoder and null condition; or a U-Net alone (text_encoder None: unconditional).

    Args:
        unet: its context_dim is the text encoder's width.
        text_encoder: trained together with the U-Net.
        null_token_ids: int64 [L], the token ids of the empty caption. Kept as a buffer and saved with the
            weights.
        null_condition: "tokens" sends null_token_ids through the text encoder in place of a dropped caption;
            "learned" replaces the context of a dropped caption by a trained `null_context` of the same shape.

    Raises:
        ValueError: parts that do not fit each other.
    """

    null_token_ids: Tensor | None

    def __init__(
        self,
        unet: UNet,
        text_encoder: TextTransformer | None = None,
        null_token_ids: Tensor | None = None,
        *,
        null_condition: Literal["tokens", "learned"] = "tokens",
    ) -> None:
        super().__init__()
        _check_parts(unet, text_encoder, null_token_ids, null_condition)
        self.unet = unet
        self.text_encoder = text_encoder
        self.null_context: NullContext | None = None
        if text_encoder is not None and null_condition == "learned":
            self.null_context = NullContext(text_encoder.max_tokens, text_encoder.width)
        self.register_buffer("null_token_ids", null_token_ids, persistent=True)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        token_ids: Tensor | None = None,
        drop: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        """The prediction, captions and all.

        Args:
            x: [B, C, H, W] noisy latent. t: [B] time steps. concat: [B, K, H, W] or None.
            token_ids: [B, L] int64 captions; None exactly without a text encoder.
            drop: [B] bool, where the null condition replaces the caption; None drops nothing.

        Returns:
            [B, out, H, W].
        """
        return self.denoise(x, t, self.context(token_ids, drop), concat)

    def context(self, token_ids: Tensor | None, drop: Tensor | None = None) -> Tensor | None:
        """[B, L] captions (and [B] which to drop) -> [B, L, D]; None without a text encoder."""
        if self.text_encoder is None:
            return None
        if token_ids is None:
            raise ValueError("this denoiser has a text encoder and was called without token_ids")
        if drop is None:
            context: Tensor = self.text_encoder(token_ids)  # [B, L, D]
            return context
        if self.null_context is not None:
            context = self.text_encoder(token_ids)  # [B, L, D]
            null = self.null_context()[: token_ids.shape[1]].to(context.dtype)  # [L, D]
            return torch.where(drop[:, None, None], null, context)  # [B, L, D]
        assert self.null_token_ids is not None
        if self.null_token_ids.shape[0] != token_ids.shape[1]:
            raise ValueError(
                f"captions have {token_ids.shape[1]} tokens and the null condition "
                f"{self.null_token_ids.shape[0]}: tokenise both to the same length"
            )
        context = self.text_encoder(torch.where(drop[:, None], self.null_token_ids, token_ids))  # [B, L, D]
        return context

    def denoise(
        self, x: Tensor, t: Tensor, context: Tensor | None = None, concat: Tensor | None = None
    ) -> Tensor:
        """The prediction for a context computed before (sampling computes it once): [B, out, H, W]."""
        prediction: Tensor = self.unet(x, t, context, concat)
        return prediction


def _check_parts(
    unet: UNet, text_encoder: TextTransformer | None, null_token_ids: Tensor | None, null_condition: str
) -> None:
    if null_condition not in ("tokens", "learned"):
        raise ValueError(f"null_condition is {null_condition!r}; expected tokens or learned")
    if text_encoder is None:
        if unet.context_dim is not None:
            raise ValueError(
                f"the U-Net reads a context of width {unet.context_dim}, but there is no text encoder"
            )
        return
    if unet.context_dim != text_encoder.width:
        raise ValueError(
            f"the U-Net has context_dim {unet.context_dim} and the text encoder width {text_encoder.width}: "
            "they must be equal"
        )
    if null_condition == "tokens":
        if null_token_ids is None:
            raise ValueError("null_condition=tokens needs null_token_ids, the token ids of the empty caption")
        if null_token_ids.dtype != torch.int64 or null_token_ids.dim() != 1:
            raise ValueError(
                f"null_token_ids is {null_token_ids.dtype} {tuple(null_token_ids.shape)}; expected int64 [L]"
            )
