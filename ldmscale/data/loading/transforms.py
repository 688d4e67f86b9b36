"""Samples to what a network trains on: `make_item` functions for the loader, as picklable values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import numpy as np

from ldmscale.data.conditions.annotations import ClassLabels, GivenEmbeddings, caption_member, caption_of
from ldmscale.data.conditions.boxes import LayoutTokens, size_told
from ldmscale.data.conditions.segmentation import ClassMaps
from ldmscale.data.conditions.spatial import Holes, SmallImages
from ldmscale.data.images.buckets import Shape
from ldmscale.data.images.decode import LATENT, MAX_PIXELS, decode_image, image_header, image_member, view_of
from ldmscale.data.latents.format import FLIPPED, LatentFormat, TextFormat, read_latent, read_text
from ldmscale.data.shards.reader import Sample
from ldmscale.data.tokenizers.bert import Tokenizer
from ldmscale.data.tokenizers.pretrained import EncoderTokenizer
from ldmscale.distributed.rng import generator


@dataclass(frozen=True)
class ImageItem:
    """Makes {"image": uint8 [3, height, width]} of a sample, with "caption" and "tokens" if asked for.

    Attributes:
        size: side of the square in pixels.
        shapes: (width, height) of the aspect-ratio buckets, in place of the square; empty without buckets.
        seed: the run's seed; with the position it gives crop and flip.
        crop, flip, max_pixels, decoder, crop_shares: as `decode.decode_image`.
        caption_source: "txt" or "json:KEY"; None leaves captions out (an autoencoder needs none).
        tokenizer: adds "tokens" int64 [max_tokens].
        labels: adds "label", the number of the sample's class.
        spatial: adds "spatial" or "mask", made of the image as it is trained on.
        maps: adds "spatial", a map of classes.
        layout: adds "tokens" int64 [max_tokens], the boxes of the part of the image that is seen.
        embeddings: adds "embeddings" float32 [max_tokens, width].
    """

    size: int
    seed: int
    _: KW_ONLY
    crop: str = "center"
    flip: bool = False
    max_pixels: int = MAX_PIXELS
    caption_source: str | None = None
    tokenizer: Tokenizer | EncoderTokenizer | None = None
    shapes: tuple[Shape, ...] = ()
    decoder: str = "pillow"
    crop_shares: tuple[float, float] = (1.0, 1.0)
    labels: ClassLabels | None = None
    spatial: SmallImages | Holes | None = None
    maps: ClassMaps | None = None
    layout: LayoutTokens | None = None
    embeddings: GivenEmbeddings | None = None

    def shape(self, bucket: int) -> tuple[int, int, int]:
        """Of "image"."""
        width, height = self.shapes[bucket] if self.shapes else (self.size, self.size)
        return (3, height, width)

    def __call__(
        self, sample: Sample, position: int, out: np.ndarray | None = None
    ) -> dict[str, np.ndarray | str | int]:
        """Makes the item; the image in `out` [3, height, width], if that is given.

        Raises:
            DataError: if the image, or what is told about it, cannot be used.
        """
        item = _told(sample.members, self.caption_source, self.tokenizer, self.labels)
        _, data = image_member(sample.members)
        _, height, width = self.shape(sample.bucket)
        size = (width, height)
        if self.maps is not None:
            item["spatial"] = self.maps.of(
                sample.members,
                size,
                self.crop,
                self.flip,
                self._draws(position),
                self.max_pixels,
                self.crop_shares,
            )
        if self.embeddings is not None:
            item["embeddings"] = self.embeddings.of(sample.members)
        if self.layout is not None:
            header = image_header(data, max_pixels=self.max_pixels)
            view = view_of(
                header.width,
                header.height,
                size,
                self.crop,
                self.flip,
                self._draws(position),
                self.crop_shares,
            )
            item["tokens"] = self.layout.of(sample.members, (header.width, header.height), view)
        image = decode_image(
            data,
            size=size,
            crop=self.crop,
            flip=self.flip,
            generator=self._draws(position),
            max_pixels=self.max_pixels,
            decoder=self.decoder,
            out=out,
            crop_shares=self.crop_shares,
        )
        item["image"] = image
        if self.spatial is not None:
            item.update(self.spatial.of(image, self.seed, position))
        return item

    def _draws(self, position: int) -> np.random.Generator | None:
        """Of the view, from its beginning: maps and boxes of a sample are seen as its image is."""
        drawn = self.crop == "random" or self.flip or self.crop_shares != (1.0, 1.0)
        return generator(self.seed, position, "crop") if drawn else None


@dataclass(frozen=True)
class LatentItem:
    """Makes {"latent": [stored_shape] in the stored dtype} of a latent sample, with "caption" and "tokens" if asked for.

    In a set of several shapes the latent is of its bucket's.

    Attributes:
        format: of the set; its `kind` says whether "latent" holds moments.
        caption_source: "txt" or "json:KEY"; None leaves captions out.
        tokenizer: adds "tokens" int64 [max_tokens].
        labels: adds "label", the number of the sample's class.
        flip: take the mirrored image's latent of every second sample, as `ImageItem` would mirror it.
        seed: the run's seed; with the position it says of which.
        layout: adds "tokens", the boxes of the part of the image that the latent is of.
        text: adds "text" [max_tokens, width] in the stored dtype, what a frozen text encoder made of the caption.
    """

    format: LatentFormat
    _: KW_ONLY
    caption_source: str | None = "txt"
    tokenizer: Tokenizer | EncoderTokenizer | None = None
    labels: ClassLabels | None = None
    flip: bool = False
    seed: int = 0
    layout: LayoutTokens | None = None
    text: TextFormat | None = None

    def __call__(self, sample: Sample, position: int) -> dict[str, np.ndarray | str | int]:
        """Makes the item.

        Raises:
            DataError: if the latent, or what is told about it, cannot be used.
        """
        item = self.told(sample.members, position, sample.bucket)
        if self.tokenizer is not None and "caption" in item:
            item["tokens"] = self.tokenizer.encode([str(item["caption"])])[0]
        if self.text is not None:
            item["text"] = read_text(sample.members, self.text)
        name = self.member(position)
        item["latent"] = read_latent(sample.members, self.format, name, sample.bucket)
        return item

    def member(self, position: int) -> str:
        """The member whose array is the latent at a position."""
        return FLIPPED if self._mirrored(position) else LATENT

    def _mirrored(self, position: int) -> bool:
        return self.flip and bool(generator(self.seed, position, "crop").random() < 0.5)

    @property
    def told_members(self) -> frozenset[str]:
        """The members that `told` looks at."""
        sources = [self.caption_source, None if self.labels is None else self.labels.source]
        if self.layout is not None:
            sources.append(self.layout.labels.source)
        return frozenset(caption_member(source) for source in sources if source is not None)

    def told(
        self, members: Mapping[str, bytes], position: int, bucket: int = 0
    ) -> dict[str, np.ndarray | str | int]:
        """The item but for "latent" and the tokens of its caption. Raises DataError as calling does."""
        item = _told(members, self.caption_source, None, self.labels)
        if self.layout is not None:
            size = size_told(members)
            _, height, width = self.format.shape_of(bucket)
            seen = view_of(*size, (width, height))._replace(mirrored=self._mirrored(position))
            item["tokens"] = self.layout.of(members, size, seen)
        return item


def _told(
    members: Mapping[str, bytes],
    source: str | None,
    tokenizer: Tokenizer | EncoderTokenizer | None,
    labels: ClassLabels | None,
) -> dict[str, np.ndarray | str | int]:
    """The conditions of a sample, each read by its own reader."""
    item: dict[str, np.ndarray | str | int] = {}
    if source is not None:
        caption = caption_of(members, source)
        item["caption"] = caption
        if tokenizer is not None:
            item["tokens"] = tokenizer.encode([caption])[0]
    if labels is not None:
        item["label"] = labels.of(members)
    return item
