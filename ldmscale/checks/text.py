"""Faults of a pretrained text encoder, seen from its config.json."""

from __future__ import annotations

from ldmscale.config import FrozenTextConfig, TextEncoderConfig
from ldmscale.errors import ConfigError
from ldmscale.pretrained_text import text_shape


def check_text_encoder(text: TextEncoderConfig | FrozenTextConfig | None) -> list[str]:
    """A trained one has none here: nothing about it lies on the disk."""
    if not isinstance(text, FrozenTextConfig):
        return []
    try:
        found = text_shape(text.path)
    except ConfigError as error:
        return [f"text_encoder.path: {fault}" for fault in error.faults]
    if found.kind != text.kind:
        known = "give another folder" if found.kind is None else f"give text_encoder.kind={found.kind}"
        return [
            f"text_encoder.kind={text.kind}, but {text.path} is a {found.model_type}: {known}; clip and t5 are read"
        ]
    faults = []
    if found.width is not None and found.width != text.width:
        faults.append(
            f"text_encoder.width={text.width}, but {text.path} has {found.width}: give text_encoder.width={found.width} "
            f"unet.context_dim={found.width}"
        )
    if found.max_tokens is not None and text.max_tokens > found.max_tokens:
        faults.append(
            f"text_encoder.max_tokens={text.max_tokens}, but {text.path} has {found.max_tokens} places: give "
            f"text_encoder.max_tokens={found.max_tokens}"
        )
    return faults
