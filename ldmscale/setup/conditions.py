"""The conditions of a diffusion run: their readers, and the items that a sample becomes with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldmscale.config import DiffusionJob, FrozenTextConfig, TextEncoderConfig
from ldmscale.data.conditions.annotations import ClassLabels
from ldmscale.data.conditions.boxes import LayoutTokens
from ldmscale.data.conditions.segmentation import ClassMaps
from ldmscale.data.conditions.spatial import Holes, SmallImages
from ldmscale.data.latents.format import LatentFormat
from ldmscale.data.loading.transforms import ImageItem, LatentItem
from ldmscale.data.tokenizers.bert import Tokenizer
from ldmscale.data.tokenizers.pretrained import EncoderTokenizer
from ldmscale.setup.classes import settle_classes, settle_layout
from ldmscale.setup.index import embeddings_reader, shapes_of
from ldmscale.setup.run import Run
from ldmscale.setup.text import settle_tokenizer


@dataclass(frozen=True)
class ConditionReaders:
    """Readers whose vocabulary is stored with the run; None where the model has no such condition."""

    tokenizer: Tokenizer | EncoderTokenizer | None = None
    classes: ClassLabels | None = None
    layout: LayoutTokens | None = None

    def null_tokens(self) -> Tensor | None:
        """Token ids int64 [L] of the empty caption or layout; None for a model that reads neither."""
        if self.layout is not None:
            return torch.from_numpy(self.layout.encode([]))
        return None if self.tokenizer is None else torch.from_numpy(self.tokenizer.encode([""])[0])


def open_condition_readers(run: Run, config: DiffusionJob) -> ConditionReaders:
    """The readers that the configuration asks for. The first start of a run stores their vocabulary. Collective."""
    text, layout, tokenizer, classes = config.text_encoder, None, None, None
    if config.layout is not None:
        assert isinstance(text, TextEncoderConfig)
        layout = settle_layout(run, config.data, config.layout, text)
    elif text is not None:
        tokenizer = settle_tokenizer(run, config, text)
    if config.class_embedder is not None:
        classes = settle_classes(run, config.data, config.class_embedder)
    return ConditionReaders(tokenizer, classes, layout)


def item_maker(
    config: DiffusionJob, readers: ConditionReaders, stored: LatentFormat | None
) -> ImageItem | LatentItem:
    """Makes training items: of `stored` latents, or of images where that is None."""
    data = config.data
    caption_source = None if readers.tokenizer is None else data.caption
    if stored is not None:
        text = stored.text if data.stored_text and isinstance(config.text_encoder, FrozenTextConfig) else None
        return LatentItem(
            stored,
            caption_source=caption_source,
            tokenizer=readers.tokenizer if text is None else None,
            text=text,
            labels=readers.classes,
            flip=data.flip,
            seed=config.seed,
            layout=readers.layout,
        )
    assert data.image_size is not None
    return ImageItem(
        data.image_size,
        config.seed,
        crop=data.crop,
        crop_shares=(data.min_crop_share, data.max_crop_share),
        flip=data.flip,
        max_pixels=data.max_pixels,
        caption_source=caption_source,
        tokenizer=readers.tokenizer,
        shapes=shapes_of(data),
        decoder=data.decoder,
        labels=readers.classes,
        spatial=spatial_reader(config),
        maps=map_reader(config),
        layout=readers.layout,
        embeddings=embeddings_reader(config.embeddings),
    )


def spatial_reader(config: DiffusionJob) -> SmallImages | Holes | None:
    """Makes the spatial condition of a sample from its image; None for a model that reads none of this kind."""
    spatial = config.spatial
    if spatial is None or spatial.kind == "map":
        return None
    if spatial.kind == "image":
        return SmallImages(config.autoencoder.factor, spatial.degradation, spatial.noise)
    return Holes(spatial.masks)


def map_reader(config: DiffusionJob) -> ClassMaps | None:
    """Reads the segmentation map of a sample; None for a model that reads none."""
    spatial = config.spatial
    if spatial is None or spatial.kind != "map":
        return None
    assert spatial.map_classes is not None
    return ClassMaps(spatial.map_member, spatial.map_classes, 2**spatial.halvings / config.autoencoder.factor)
