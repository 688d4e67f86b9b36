"""`ldmscale import`: a model in the format of others as a folder that `load`, `sample` and `export` read."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ldmscale.config import ImportJob, TextEncoderConfig, UNetConfig
from ldmscale.config.load import configured

log = logging.getLogger(__name__)


def main(overrides: Sequence[str]) -> int:
    """Import as configured; see `cli` for the exit status."""
    config, ranks = configured(ImportJob, overrides)
    from ldmscale.interop.compvis import kinds_kept
    from ldmscale.interop.limits import not_finite
    from ldmscale.interop.model import write_model
    from ldmscale.interop.reading import Given, add_tokenizer, published_unets, read
    from ldmscale.storage.atomic import appearing
    from ldmscale.tracking.logs import set_up_logging

    set_up_logging(None, ranks)
    unet, text = config.unet, config.text_encoder
    given = Given(
        config=None if config.config is None else Path(config.config),
        unet=unet if isinstance(unet, UNetConfig) else None,
        unet_heads=unet.heads,
        unet_head_channels=unet.head_channels,
        text_encoder=text if isinstance(text, TextEncoderConfig) else None,
        text_heads=text.heads,
        text_head_channels=text.head_channels,
        class_embedder=config.class_embedder,
        spatial=config.spatial,
        diffusion=config.diffusion,
        scale_factor=config.scale_factor,
        latent_size=config.latent_size,
    )
    model = read(Path(config.src), given)
    dst = Path(config.dst)
    with tempfile.TemporaryDirectory() as temporary, appearing(dst, config.overwrite) as folder:
        if config.tokenizer is not None:
            add_tokenizer(model, config.tokenizer, Path(temporary) / "tokenizer")
        write_model(model, folder)
    for name, part in model.parts.items():
        count = sum(tensor.numel() for tensor in part.weights.values())
        log.info("%s: %d parameters%s", name, count, "" if part.averaged is None else ", and averaged copies")
        for copies, tensors in (("weights", part.weights), ("averaged weights", part.averaged or {})):
            if wrong := not_finite(tensors):
                log.warning(
                    "%s: %d of %d %s hold values that are not finite (first: %s); they are kept as they are, and such a "
                    "network computes nothing of use", name, len(wrong), len(tensors), copies, wrong[0],
                )  # fmt: skip
    for what, count in kinds_kept(model).items():
        log.info("kept as they are: %d tensors, %s", count, what)
    for told in model.unknown.values():
        log.warning("%s; as it is, the model can be exported as compvis and not be run", told)
    if "unet.heads" in model.unknown and model.unet is not None and (names := published_unets(model.unet)):
        log.warning(
            "its U-Net has the shapes of %s: if that is the model, import it again with unet=%s",
            " and ".join(names), names[0],
        )  # fmt: skip
    log.info("%s is in %s", config.src, dst)
    return 0
