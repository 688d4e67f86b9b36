"""Conditions of `ldmscale sample` from files: small images to enlarge, maps, images with a hole to fill.

    small image   NAME.png|jpg|...: drawn four times as large (by the first stage's factor)
    map           NAME.png, grey or palette, a class number a pixel: drawn at the size that maps and images had in training
    hole          NAME.png with NAME_mask.png beside it, white in the hole: what is known comes back as it was
    embeddings    NAME.npy, floats [embeddings, width]
    layout        NAME.json as a sample of a shard has it: {"boxes": [{"class": ..., "box": [left, top, right, bottom]}]}

Pictures may have any size. The networks halve them, so their edges are repeated up to the next multiple, and what
was added is cut off again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldmscale.data.conditions.annotations import GivenEmbeddings
from ldmscale.data.conditions.boxes import LayoutTokens
from ldmscale.data.conditions.segmentation import map_of
from ldmscale.data.images.decode import EXTENSIONS, rgb_image
from ldmscale.errors import ConfigError, DataError
from ldmscale.inference.image_set import Wanted, file_digest, text_digest
from ldmscale.inference.parts import Parts
from ldmscale.inference.sample import conditions_of, size_step
from ldmscale.models.conditions import Conditions, GivenContext
from ldmscale.stages.first_stage import FirstStage, masked_latents

MASK = "_mask"  # ends the stem of a mask's file
ARRAYS = ("json", "npy")  # layouts and embeddings: what tells no size of the image


@dataclass(frozen=True)
class _Read:
    """One condition, with its edges repeated."""

    spatial: Tensor  # as Conditions.spatial, [1,K,h,w]
    size: tuple[int, int]  # height and width of the image without what was added
    known: Tensor | None = None  # float32 [3,H,W] in [-1,1], what comes back outside of the hole
    hole: Tensor | None = None  # bool [1,H,W]


def condition_files(given: str | tuple[str, ...]) -> list[Path]:
    """The files of `sample.condition` in the order of drawing: a list as it is, a folder by its names, without masks.

    Raises ConfigError where there is none.
    """
    if not isinstance(given, str):
        return [Path(path) for path in given]
    path = Path(given)
    if not path.is_dir():
        return [path]
    found = [
        file
        for file in sorted(path.iterdir())
        if file.suffix[1:].lower() in (*EXTENSIONS, *ARRAYS) and not file.stem.endswith(MASK)
    ]
    if not found:
        raise ConfigError(
            f"sample.condition={given} has no file that ends with {', '.join((*EXTENSIONS, *ARRAYS))}"
        )
    return found


def faults_of_files(given: str | tuple[str, ...], spatial: Mapping[str, Any] | None) -> list[str]:
    """Pictures without the mask that a model with this `spatial` setting wants beside each; nothing is read."""
    if spatial is None or spatial["kind"] != "masked":
        return []
    alone = [file for file in condition_files(given) if _mask_of(file) is None]
    more = f" ({len(alone)} such files)" if len(alone) > 1 else ""
    return [
        f"sample.condition: {file} has no {file.stem}{MASK}.png beside it, white in the hole{more}"
        for file in alone[:1]
    ]


def conditions_digest(given: str | tuple[str, ...]) -> str:
    """What tells these files, masks included, from others."""
    files = [part for file in condition_files(given) for part in (file, _mask_of(file)) if part is not None]
    return text_digest("".join(file_digest(file) for file in files))


class Told:
    """What each wanted image is told by its file."""

    def __init__(
        self, parts: Parts, given: str | tuple[str, ...], per_prompt: int, tile_pixels: int | None = None
    ) -> None:
        assert parts.autoencoder and parts.denoiser and parts.scale
        self._parts, self._files, self._per_prompt = parts, condition_files(given), per_prompt
        device = next(parts.denoiser.parameters()).device
        self._first_stage = FirstStage(parts.autoencoder, parts.scale, device, tile_pixels)
        # Of the batch that is drawn: encoding a large picture takes a while.
        self._latest: dict[Path, _Read] = {}

    def of_one_size(self, wanted: Sequence[Wanted], most: int) -> list[list[Wanted]]:
        """The images in their order, in batches of at most `most` that are of one size."""
        if self._parts.spatial is None:
            return [list(wanted[start : start + most]) for start in range(0, len(wanted), most)]
        batches: list[list[Wanted]] = []
        sizes: list[tuple[int, int]] = []
        for image in wanted:
            size = self._pixels(self._file(image)).shape[:2]
            if not batches or sizes[-1] != size or len(batches[-1]) == most:
                batches.append([])
                sizes.append((size[0], size[1]))
            batches[-1].append(image)
        return batches

    def conditions(self, batch: Sequence[Wanted]) -> Conditions:
        """What a batch of one size is told, by its prompts and its files."""
        given = None if self._parts.denoiser is None else self._parts.denoiser.embeddings
        if given is not None:
            found = [self._embeddings(given, self._file(image)) for image in batch]
            return Conditions(embeddings=torch.from_numpy(np.stack(found)))
        if self._parts.layout is not None:
            layouts = [self._layout(self._parts.layout, self._file(image)) for image in batch]
            return Conditions(token_ids=torch.from_numpy(np.stack(layouts)))
        files = [self._file(image) for image in batch]
        self._latest = {file: self._read(file) for file in dict.fromkeys(files)}
        spatial = torch.cat([self._latest[file].spatial for file in files])
        return conditions_of(self._parts, [image.prompt for image in batch], spatial)

    def finished(self, batch: Sequence[Wanted], images: Tensor) -> Tensor:
        """Drawn images float32 [N,3,H,W] of the batch that `conditions` was asked for last.

        What was added at their edges is cut off, and known pixels are put back.
        """
        if self._parts.spatial is None:
            return images
        whole = []
        for wanted, image in zip(batch, images, strict=True):
            read = self._latest[self._file(wanted)]
            cut = image[:, : read.size[0], : read.size[1]]
            if read.known is not None and read.hole is not None:
                cut = torch.where(read.hole, cut, read.known)
            whole.append(cut)
        return torch.stack(whole)

    def _file(self, image: Wanted) -> Path:
        return self._files[image.number // self._per_prompt]

    def _layout(self, layout: LayoutTokens, file: Path) -> np.ndarray:
        """Tokens int64 [L] of the boxes in a file."""
        try:
            return layout.encode(layout.boxes({"json": file.read_bytes()}))
        except (OSError, DataError) as error:
            raise ConfigError(f"sample.condition: {file}: {error}") from error

    def _embeddings(self, context: GivenContext, file: Path) -> np.ndarray:
        """float32 [L, D] of a file."""
        reader = GivenEmbeddings(file.name, context.width, context.max_tokens)
        try:
            return reader.of({file.name: file.read_bytes()})
        except (OSError, DataError) as error:
            raise ConfigError(f"sample.condition: {file}: {error}") from error

    def _read(self, file: Path) -> _Read:
        pixels = self._pixels(file)
        height, width = pixels.shape[:2]
        assert self._parts.autoencoder is not None
        factor: int = self._parts.autoencoder.downsampling
        step = size_step(self._parts)
        if self._parts.spatial == "image":
            small = _channels_first(_padded(pixels, step // factor)).float() / 127.5 - 1
            return _Read(small[None], (height * factor, width * factor))
        if self._parts.spatial == "map":
            return self._read_map(file, step // factor, factor)
        if self._parts.spatial != "masked":
            raise ConfigError(f"sample.condition: the model reads {self._parts.spatial}, which no file gives")
        mask_file = _mask_of(file)
        if mask_file is None:
            raise ConfigError(
                f"sample.condition: {file} has no {file.stem}{MASK}.png beside it, white in the hole"
            )
        hole = np.array(_opened(mask_file).convert("L")) > 127
        if hole.shape != (height, width):
            raise ConfigError(
                f"sample.condition: {mask_file} has {hole.shape[1]}x{hole.shape[0]} pixels and {file} {width}x{height}"
            )
        image = _channels_first(_padded(pixels, step))[None]
        mask = torch.from_numpy(_padded(hole.astype(np.uint8), step))[None, None]
        spatial = masked_latents(self._first_stage, image, mask)
        known = _channels_first(pixels).float() / 127.5 - 1
        return _Read(spatial.cpu(), (height, width), known, torch.from_numpy(hole)[None])

    def _read_map(self, file: Path, positions: int, factor: int) -> _Read:
        """A map of classes, of as many pixels for each position of the latent as the rescaler halves away."""
        rescaler = self._parts.spatial_rescaler
        assert rescaler is not None
        try:
            numbers = map_of(file.read_bytes(), str(file), rescaler.channel_mapper.in_channels)
        except DataError as error:
            raise ConfigError([f"sample.condition: {fault}" for fault in error.faults]) from error
        share = 2**rescaler.halvings
        height, width = (side * factor // share for side in numbers.shape)
        spatial = torch.from_numpy(_padded(numbers, positions * share))[None]
        return _Read(spatial, (height, width))

    def _pixels(self, file: Path) -> np.ndarray:
        """uint8 [H,W,3]."""
        return np.array(_opened(file))


def _mask_of(file: Path) -> Path | None:
    return next(
        (
            found
            for extension in EXTENSIONS
            if (found := file.with_name(f"{file.stem}{MASK}.{extension}")).is_file()
        ),
        None,
    )


def _opened(file: Path) -> Image.Image:
    try:
        return rgb_image(file.read_bytes())
    except (OSError, DataError) as error:
        raise ConfigError(f"sample.condition: {file} cannot be read as an image: {error}") from error


def _padded(pixels: np.ndarray, step: int) -> np.ndarray:
    """[H,W,...] with its last row and column repeated up to multiples of `step`."""
    edges = [(0, -side % step) for side in pixels.shape[:2]]
    return np.pad(pixels, edges + [(0, 0)] * (pixels.ndim - 2), mode="edge")


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
