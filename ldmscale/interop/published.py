"""Which published configuration a network looks like: it brings what the shapes of a checkpoint do not tell."""

from __future__ import annotations

from dataclasses import replace

import yaml

from ldmscale.compose import config_folder
from ldmscale.config import UNetConfig


def published_unets(found: UNetConfig) -> list[str]:
    """The files of conf/unet/ whose networks have the same shapes. They bring the heads, which no shape tells."""

    def shapes(config: UNetConfig) -> UNetConfig:
        return replace(config, heads=None, head_channels=None, dropout=0.0, checkpointing="off")

    names = []
    for path in sorted((config_folder() / "unet").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "defaults" not in values and shapes(UNetConfig(**values)) == shapes(found):
            names.append(path.stem)
    return names
