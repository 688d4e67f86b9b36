"""The reader of a run's spatial condition, as its configuration asks."""

from __future__ import annotations

from ldmscale.config import DiffusionJob
from ldmscale.data.spatial import Holes, SmallImages


def spatial_reader(config: DiffusionJob) -> SmallImages | Holes | None:
    """What adds the spatial condition to a sample; None where the model reads none."""
    spatial = config.spatial
    if spatial is None:
        return None
    if spatial.kind == "image":
        return SmallImages(config.autoencoder.factor, spatial.degradation, spatial.noise)
    return Holes(spatial.masks)
