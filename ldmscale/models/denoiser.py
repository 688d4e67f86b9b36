"""What the diffusion stage trains: the U-Net, what reads its conditions, and the null condition.

One forward covers all of it, so that one engine can own it. The null condition is a named part of the model,
the same in training (it replaces dropped conditions), in sampling (the unconditional half of guidance, Ho &
Salimans 2021) and in export.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ldmscale.models.conditions import (
    ClassEmbedder,
    Conditions,
    Encoded,
    GivenContext,
    NullContext,
    SpatialRescaler,
)
from ldmscale.models.text_encoder import FrozenTextEncoder, TextTransformer
from ldmscale.models.unet import UNet

NOTHING = Conditions()


class Denoiser(nn.Module):
    """A U-Net with the readers of its conditions. Without any it is unconditional.

    At most one reader gives the context: `text_encoder`, `class_embedder` or `embeddings`. Channels may be
    joined to the latent beside it.

    Args:
        unet: its context_dim is the width of the reader.
        text_encoder: trained together with the U-Net; reads captions and layouts. A frozen one is no part of this
            network: whoever opened it places it, and no engine, checkpoint or optimiser sees it.
        null_token_ids: int64 [L], the empty caption or layout. A buffer, saved with the weights.
        null_condition: what replaces a dropped context. "tokens": an input of the reader that says nothing (the
            empty caption, the class behind the others, embeddings of zeros). "learned": a trained
            `null_context`.
        class_embedder: reads labels.
        embeddings: says that the context comes with the data.
        spatial_rescaler: reads a map that is larger than the latent. Without it `Conditions.spatial` is joined
            as it is, if the U-Net has channels for it.

    Raises:
        ValueError: parts that do not fit each other.
    """

    null_token_ids: Tensor | None

    def __init__(
        self,
        unet: UNet,
        text_encoder: TextTransformer | FrozenTextEncoder | None = None,
        null_token_ids: Tensor | None = None,
        *,
        null_condition: Literal["tokens", "learned"] = "tokens",
        class_embedder: ClassEmbedder | None = None,
        embeddings: GivenContext | None = None,
        spatial_rescaler: SpatialRescaler | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = None if isinstance(text_encoder, FrozenTextEncoder) else text_encoder
        # In a tuple, where torch does not look for networks.
        self._frozen_text = (text_encoder,) if isinstance(text_encoder, FrozenTextEncoder) else ()
        self._null_text: Tensor | None = None
        self.class_embedder = class_embedder
        self.embeddings = embeddings
        self.spatial_rescaler = spatial_rescaler
        self._check_parts(null_condition, null_token_ids)
        self.null_context: NullContext | None = None
        reader = self._reader()
        if reader is not None and null_condition == "learned":
            self.null_context = NullContext(reader.max_tokens, reader.width)
        self.register_buffer("null_token_ids", null_token_ids, persistent=True)

    @property
    def reads_text(self) -> TextTransformer | FrozenTextEncoder | None:
        """What turns token ids into the context, trained or frozen."""
        return next(iter(self._frozen_text), self.text_encoder)

    @property
    def has_null(self) -> bool:
        """Whether a context can be dropped, and so whether guidance is possible."""
        if self.null_context is not None:
            return True
        if self.class_embedder is not None:
            return self.class_embedder.null_label is not None
        return self._reader() is not None

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        conditions: Conditions = NOTHING,
        drop: Tensor | None = None,
        drop_spatial: Tensor | None = None,
    ) -> Tensor:
        """The prediction, conditions and all.

        Args:
            x: [B, C, H, W] noisy latent. t: [B] time steps.
            conditions: exactly what this model reads.
            drop, drop_spatial: see `encode`.

        Returns:
            [B, out, H, W].
        """
        context, concat = self.encode(conditions, drop, drop_spatial)
        return self.denoise(x, t, context, concat)

    def encode(
        self, conditions: Conditions, drop: Tensor | None = None, drop_spatial: Tensor | None = None
    ) -> Encoded:
        """Conditions as the U-Net takes them; sampling does this once for all its steps.

        Args:
            conditions: exactly what this model reads.
            drop: [B] bool, where the null condition replaces the context; None drops nothing.
            drop_spatial: [B] bool, where zeros replace the joined channels (Brooks et al. 2023); None: nowhere.

        Raises:
            ValueError: a condition that the model reads is missing, or one that it does not read is given.
        """
        self._check_given(conditions)
        return Encoded(self._context(conditions, drop), self._concat(conditions.spatial, drop_spatial))

    def denoise(
        self, x: Tensor, t: Tensor, context: Tensor | None = None, concat: Tensor | None = None
    ) -> Tensor:
        """The prediction for conditions encoded before: [B, out, H, W]."""
        context = None if context is None else context.to(x.dtype)
        concat = None if concat is None else concat.to(x.dtype)
        prediction: Tensor = self.unet(x, t, context, concat)
        return prediction

    def _reader(self) -> TextTransformer | FrozenTextEncoder | ClassEmbedder | GivenContext | None:
        return self.reads_text or self.class_embedder or self.embeddings

    def _context(self, conditions: Conditions, drop: Tensor | None) -> Tensor | None:
        reader = self._reader()
        if reader is None:
            return None
        if drop is not None and not self.has_null:
            raise ValueError("this model has no null condition that could replace a dropped one")
        if conditions.text is not None:
            return self._encoded_text(conditions.text, drop)
        given = conditions.token_ids if self.reads_text is not None else conditions.labels
        given = conditions.embeddings if self.embeddings is not None else given
        assert given is not None
        if drop is not None and self.null_context is None:
            given = torch.where(_for_rows(drop, given), self._null_input(given), given)
        context: Tensor = reader(given)  # [B, L, D]
        return self._with_null_context(context, drop)

    def _encoded_text(self, context: Tensor, drop: Tensor | None) -> Tensor:
        """Outputs of the frozen text encoder that were stored, with those of the null condition where it replaces them."""
        encoder, context = self.reads_text, context.float()
        if drop is not None and self.null_context is None:
            assert encoder is not None and self.null_token_ids is not None
            if self._null_text is None:  # made once: the encoder is not trained
                self._null_text = encoder(self.null_token_ids[None].to(context.device))  # [1, L, D]
            context = torch.where(_for_rows(drop, context), self._null_text.to(context.device), context)
        return self._with_null_context(context, drop)

    def _with_null_context(self, context: Tensor, drop: Tensor | None) -> Tensor:
        if drop is None or self.null_context is None:
            return context
        null = self.null_context()[: context.shape[1]].to(context.dtype)  # [L, D]
        return torch.where(_for_rows(drop, context), null, context)  # [B, L, D]

    def _null_input(self, given: Tensor) -> Tensor:
        """What the reader is given for a dropped sample, of a shape that broadcasts to `given`."""
        if self.class_embedder is not None:
            return torch.full_like(given, self.class_embedder.null_label or 0)  # [B]
        if self.embeddings is not None:
            return torch.zeros_like(given)  # [B, L, D]
        assert self.null_token_ids is not None
        if self.null_token_ids.shape[0] != given.shape[1]:
            raise ValueError(
                f"captions have {given.shape[1]} tokens and the null condition "
                f"{self.null_token_ids.shape[0]}: tokenise both to the same length"
            )
        return self.null_token_ids  # [L]

    def _concat(self, spatial: Tensor | None, drop: Tensor | None) -> Tensor | None:
        if spatial is None:
            return None
        if self.spatial_rescaler is not None:
            spatial = self.spatial_rescaler(spatial)  # [B, K, h, w]
        if drop is None:
            return spatial
        return torch.where(_for_rows(drop, spatial), torch.zeros_like(spatial), spatial)  # [B, K, h, w]

    def _check_given(self, conditions: Conditions) -> None:
        channels = self.unet.in_channels - self.unet.out_channels
        reads = (self.reads_text, self.class_embedder, self.embeddings, channels or None)
        if conditions.text is not None:
            if not self._frozen_text:
                raise ValueError(
                    "this denoiser has no frozen text encoder and was called with outputs of one"
                )
            conditions = conditions._replace(token_ids=conditions.text)  # in their place
        for name, part, reader in zip(Conditions._fields[:-1], conditions[:-1], reads, strict=True):
            if (part is None) != (reader is None):
                raise ValueError(
                    f"this denoiser reads {'no ' if reader is None else ''}{name} and was called "
                    f"with{'out' if part is None else ''} them"
                )

    def _check_parts(self, null_condition: str, null_token_ids: Tensor | None) -> None:
        if null_condition not in ("tokens", "learned"):
            raise ValueError(f"null_condition is {null_condition!r}; expected tokens or learned")
        named = {
            "text encoder": self.reads_text,
            "class embedder": self.class_embedder,
            "embeddings": self.embeddings,
        }
        readers = {name: reader.width for name, reader in named.items() if reader is not None}
        if len(readers) > 1:
            raise ValueError(f"{' and '.join(readers)} would both give the context: give one of them")
        if not readers and self.unet.context_dim is not None:
            raise ValueError(
                f"the U-Net reads a context of width {self.unet.context_dim}, but there is no text encoder, "
                "class embedder or embeddings"
            )
        for name, width in readers.items():
            if self.unet.context_dim != width:
                raise ValueError(
                    f"the U-Net has context_dim {self.unet.context_dim} and the {name} width {width}: "
                    "they must be equal"
                )
        channels = self.unet.in_channels - self.unet.out_channels
        if self.spatial_rescaler is not None and self.spatial_rescaler.out_channels != channels:
            raise ValueError(
                f"the U-Net has room for {channels} joined channels, the spatial rescaler gives "
                f"{self.spatial_rescaler.out_channels}"
            )
        if self.reads_text is not None and null_condition == "tokens":
            if null_token_ids is None:
                raise ValueError(
                    "null_condition=tokens needs null_token_ids, the token ids of the empty caption"
                )
            if null_token_ids.dtype != torch.int64 or null_token_ids.dim() != 1:
                raise ValueError(
                    f"null_token_ids is {null_token_ids.dtype} {tuple(null_token_ids.shape)}; expected int64 [L]"
                )


def _for_rows(drop: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] of as many axes as `like`."""
    return drop.view(-1, *(1 for _ in range(like.dim() - 1)))
