"""The readers of what goes with the images of a run, as its configuration asks."""

from __future__ import annotations

from ldmscale.config import DiffusionJob, EmbeddingsConfig
from ldmscale.data.embeddings import GivenEmbeddings
from ldmscale.data.maps import ClassMaps
from ldmscale.data.spatial import Holes, SmallImages


def spatial_reader(config: DiffusionJob) -> SmallImages | Holes | None:
    """What adds the spatial condition to a sample; None where the model reads none."""
    spatial = config.spatial
    if spatial is None or spatial.kind == "map":
        return None
    if spatial.kind == "image":
        return SmallImages(config.autoencoder.factor, spatial.degradation, spatial.noise)
    return Holes(spatial.masks)


def map_reader(config: DiffusionJob) -> ClassMaps | None:
    """What reads the map of a sample; None where the model reads none."""
    spatial = config.spatial
    if spatial is None or spatial.kind != "map":
        return None
    assert spatial.map_classes is not None
    return ClassMaps(spatial.map_member, spatial.map_classes, 2**spatial.halvings / config.autoencoder.factor)


def embeddings_reader(given: EmbeddingsConfig | None) -> GivenEmbeddings | None:
    """What reads the embeddings of a sample; None where the model reads none."""
    return None if given is None else GivenEmbeddings(given.member, given.width, given.max_tokens)
