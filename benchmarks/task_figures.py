"""The figure of each small task: what the condition asks for, measured on what is drawn.

Beside the model's own figure stand that of chance, which a model that ignores its condition would reach, and that of the
first stage alone, whose reconstructions of the real images bound it from above.

    unconditional   share of pictures that lie among the real ones (within the distance to the third nearest real one of
                    some real picture; Kynkäänniemi et al. 2019); chance: of decoded normal noise
    class, text     share of pictures whose nearest real picture is of the class asked for; of captions also whether the
                    caption's own picture is among the five nearest
    layout          IoU of what is not white with the boxes together; and of the cut-out boxes the share whose nearest real
                    cut-out is of the class asked for; chance: the boxes of other layouts
    semantic        share of coloured pixels of the map whose colour is drawn; chance: of other maps
    superres        PSNR of sprites enlarged from 8 to 32 pixels, of one drawing and of the mean of eight (a drawing has the
                    details of one possible sprite, which cost PSNR where they are wrong; the mean does not), beside bicubic
                    enlargement; chance: other sprites
    inpainting      PSNR inside the hole, beside the mean colour around it; chance: the holes of other sprites
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ldmscale import Parts, load, sample
from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.config import DiffusionJob
from ldmscale.config.typed import read
from ldmscale.data.conditions.boxes import Box
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.mixture import Mixture, WeightedShards
from ldmscale.data.sources.sprites import PALETTE, nearest_colours
from ldmscale.evaluation.metrics import PromptFollowing, prompt_following, reconstruct
from ldmscale.inference.prompt_score import RealImages, read_images
from ldmscale.models.conditions import Conditions
from ldmscale.models.first_stage import FirstStageNetwork
from ldmscale.setup.conditions import map_reader, spatial_reader
from ldmscale.stages.first_stage import FirstStage, batch_conditions
from ldmscale.tracking.images import tile, to_uint8, write_png

SIZE, BATCH, SHOWN, ZOOM = 32, 48, 10, 2
SEEN = 0.25  # of the range 2 that a channel must differ from white to count as drawn
DRAWINGS = 8  # that a mean is taken of
CUT = 12  # pixels of the side that cut-out boxes are compared at
WITH_LATENTS = ("unconditional_small", "class_small", "text_small")  # their conditions go with latents
Figures = dict[str, dict[str, float]]


@dataclass
class Drawn:
    """What was drawn, beside what is real.

    Attributes:
        images: float [N,3,S,S] in [-1,1]. real: of the same samples. decoded: those as the first stage reconstructs them.
        batch: what the readers told of the samples, as tensors [N, ...] or lists.
        parts: the model. autoencoder: its own. first_stage: that with the scale that it was trained behind.
        source: folder of the quickstart.
        again: drawings for the same conditions by other noise; its number is the first seed.
    """

    images: Tensor
    real: Tensor
    decoded: Tensor
    batch: dict[str, Any]
    parts: Parts
    autoencoder: FirstStageNetwork
    first_stage: FirstStage
    source: Path
    again: Callable[[int], Tensor]


def measure(task: str, run: Path, source: Path, images: int, steps: int) -> dict[str, Any]:
    """Figures of a trained run, and RUN/task.png with ten of the pictures: condition (where it is one), drawn, real."""
    config = read(DiffusionJob, RunFolder(run).config())
    parts = load(run)
    assert parts.autoencoder and parts.scale
    first_stage = FirstStage(parts.autoencoder, parts.scale, torch.device("cpu"))
    shards = shards_of(task, source, "train" if task in WITH_LATENTS else "heldout")
    batch = _samples(shards, _reader(config, parts), images)
    real = batch["image"].float() / 127.5 - 1
    decoded = reconstruct(parts.autoencoder, real)
    count = len(real)
    told = batch_conditions(batch, first_stage) if task != "unconditional_small" else Conditions()
    guidance = config.preview.guidance

    def draw(first_seed: int) -> Tensor:
        rows = [slice(start, start + BATCH) for start in range(0, count, BATCH)]
        return torch.cat([_drawn(parts, told, part, count, first_seed, steps, guidance) for part in rows])

    found = Drawn(draw(0), real, decoded, batch, parts, parts.autoencoder, first_stage, source, draw)
    figures = FIGURES[task](found)
    write_png(run / "task.png", _sheet(task, found))
    return {
        "task": task,
        "figures": figures,
        "images": count,
        "sampler_steps": steps,
        "guidance": guidance,
        "trained_steps": RunFolder(run).finished_step(),
    }


def _drawn(
    parts: Parts, told: Conditions, rows: slice, count: int, first_seed: int, steps: int, guidance: float
) -> Tensor:
    """The pictures of some rows of the conditions, each by its own seed."""
    seeds = list(range(first_seed, first_seed + count))[rows]
    conditions = told.changed(lambda part: part[rows])
    return sample(
        parts, [""] * len(seeds), steps=steps, guidance=guidance, seeds=seeds, conditions=conditions
    )


def unconditional(found: Drawn) -> Figures:
    real = reconstruct(found.autoencoder, _every(found.source).pixels)
    assert found.parts.latent_shape is not None
    draws = torch.randn(
        len(found.images), *found.parts.latent_shape, generator=torch.Generator().manual_seed(1)
    )
    noise = found.first_stage.images(draws).clamp(-1, 1)
    return {
        "share among the real": {
            "model": _among(found.images, real),
            "chance": _among(noise, real),
            "first_stage": _among(found.decoded, real, own=True),
        }
    }


def classes(found: Drawn) -> Figures:
    followed = _followed(found)
    return {"class of the nearest": {"model": followed.class_share, "chance": followed.class_chance}}


def captions(found: Drawn) -> Figures:
    followed = _followed(found)
    return {
        "class of the nearest": {"model": followed.class_share, "chance": followed.class_chance},
        "own picture among 5": {"model": followed.own_share, "chance": followed.own_chance},
    }


def layouts(found: Drawn) -> Figures:
    boxes = _boxes(found)
    asked = torch.stack([_inside(listed) for listed in boxes])  # [N,S,S]
    others = [_iou(_seen(found.images), asked.roll(shift, 0)) for shift in range(1, 9)]
    cut, labels, real, real_labels = [], [], [], []
    for image, decoded, listed in zip(found.images, found.decoded, boxes, strict=True):
        cut += [_cut(image, box) for box in listed]
        real += [_cut(decoded, box) for box in listed]
        labels += [box.label for box in listed]
        real_labels += [str(box.label) for box in listed]
    distance = torch.cdist(torch.stack(cut).flatten(1), torch.stack(real).flatten(1))
    nearest = distance.argmin(1).tolist()
    right = [real_labels[n] == str(label) for n, label in zip(nearest, labels, strict=True)]
    shares = [real_labels.count(str(label)) / len(real_labels) for label in labels]
    return {
        "IoU with the boxes": {
            "model": _iou(_seen(found.images), asked),
            "chance": sum(others) / len(others),
            "first_stage": _iou(_seen(found.decoded), asked),
        },
        "class in the box": {"model": sum(right) / len(right), "chance": sum(shares) / len(shares)},
    }


def semantic(found: Drawn) -> Figures:
    maps = functional.interpolate(found.batch["spatial"][:, None].float(), size=(SIZE, SIZE))[:, 0].long()

    def agreement(images: Tensor, wanted: Tensor) -> float:
        coloured = wanted != list(PALETTE).index("white")
        drawn = torch.from_numpy(np.stack([nearest_colours(image) for image in to_uint8(images)])).long()
        return float((drawn == wanted)[coloured].float().mean())

    return {
        "colours of the map": {
            "model": agreement(found.images, maps),
            "chance": sum(agreement(found.images, maps.roll(shift, 0)) for shift in range(1, 9)) / 8,
            "first_stage": agreement(found.decoded, maps),
        }
    }


def superres(found: Drawn) -> Figures:
    bicubic = torch.stack([_enlarged(small) for small in found.batch["spatial"]])
    whole = torch.ones_like(found.real, dtype=torch.bool)
    drawings = [found.images, *(found.again(1000 * number) for number in range(1, DRAWINGS))]
    mean = torch.stack(drawings).mean(0)
    return {
        "PSNR, dB": _psnr_figures(found, whole),
        f"PSNR of the mean of {DRAWINGS}, dB": {"model": _psnr(mean, found.real, whole)},
        "bicubic, dB": {"model": _psnr(bicubic, found.real, whole)},
    }


def inpainting(found: Drawn) -> Figures:
    hole = found.batch["mask"].bool().expand_as(found.real)
    known = (found.real * ~hole).sum((2, 3)) / (~hole).sum((2, 3)).clamp(min=1)  # [N,3]
    filled = known[:, :, None, None].expand_as(found.real)
    return {
        "PSNR in the hole, dB": _psnr_figures(found, hole),
        "mean fill, dB": {"model": _psnr(filled, found.real, hole)},
    }


FIGURES = {
    "unconditional_small": unconditional,
    "class_small": classes,
    "text_small": captions,
    "layout_small": layouts,
    "semantic_small": semantic,
    "superres_small": superres,
    "inpainting_small": inpainting,
}


def shards_of(task: str, source: Path, part: str) -> str:
    """The shards of images that a task is about."""
    return str(source / "data" / f"{'scenes-' if task == 'layout_small' else ''}{part}-*.tar")


def _reader(config: DiffusionJob, parts: Parts) -> ImageItem:
    """Reads samples as the run was told of them, unmirrored."""
    text = parts.tokenizer
    return ImageItem(
        SIZE, 0, caption_source=config.data.caption if text is not None else None, tokenizer=text,
        labels=parts.classes if parts.class_embedder is not None else None, spatial=spatial_reader(config),
        maps=map_reader(config), layout=parts.layout,
    )  # fmt: skip


def _samples(shards: str, reader: ImageItem, most: int) -> dict[str, Any]:
    """The first samples of the shuffled order as one batch."""
    index = Mixture.open([WeightedShards(shards)], build_missing=True)
    count = min(most, index.total)
    loader = Loader(index, reader, seed=0, rank=0, world=1, global_batch=count, rank_micro_batch=count)
    batch = dict(next(loader))
    loader.close()
    return batch


def _every(source: Path) -> RealImages:
    """Every sprite, trained on or not."""
    shards = [sorted(map(str, (source / "data").glob(f"{part}-*.tar"))) for part in ("train", "heldout")]
    return read_images(shards[0], shards[1], SIZE)


def _followed(found: Drawn) -> PromptFollowing:
    """Whether pictures are nearest to those that were asked for, among all as the first stage reconstructs them."""
    every = _every(found.source)
    own = [every.keys.index(key) for key in found.batch["key"]]
    decoded = reconstruct(found.autoencoder, every.pixels)
    return prompt_following(found.images, own, decoded, every.classes)


def _among(images: Tensor, real: Tensor, own: bool = False) -> float:
    """Share of images within some real image's distance to its third nearest real one; `own`: but for itself."""
    flat, others = images.flatten(1).double(), real.flatten(1).double()
    radius = torch.cdist(others, others).kthvalue(4, dim=1).values  # the first is itself
    distance = torch.cdist(flat, others)  # [N,M]
    if own:
        distance = distance.masked_fill(distance < 1e-3, torch.inf)
    return float((distance <= radius).any(1).double().mean())


def _boxes(found: Drawn) -> list[list[Box]]:
    """The boxes that each sample was told, back from its tokens: as precise as the grid."""
    layout = found.parts.layout
    assert layout is not None
    last = layout.grid - 1

    def corner(token: int) -> tuple[float, float]:
        return token % layout.grid / last, token // layout.grid / last

    rows = []
    for tokens in found.batch["tokens"].tolist():
        objects = [tokens[i : i + 3] for i in range(0, 3 * layout.objects, 3)]
        rows.append([Box(a, *corner(b), *corner(c)) for a, b, c in objects if a != layout.nothing])
    return rows


def _pixels(box: Box) -> tuple[int, int, int, int]:
    left, top = int(box.left * SIZE), int(box.top * SIZE)
    return left, top, max(left + 1, round(box.right * SIZE)), max(top + 1, round(box.bottom * SIZE))


def _inside(boxes: Sequence[Box]) -> Tensor:
    """bool [S,S], where some box is."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for box in boxes:
        left, top, right, bottom = _pixels(box)
        mask[top:bottom, left:right] = True
    return mask


def _cut(image: Tensor, box: Box) -> Tensor:
    left, top, right, bottom = _pixels(box)
    return functional.interpolate(image[None, :, top:bottom, left:right], size=(CUT, CUT), mode="bilinear")[0]


def _seen(images: Tensor) -> Tensor:
    """bool [N,S,S], where images are not white."""
    return (1 - images).amax(1) > SEEN


def _iou(seen: Tensor, asked: Tensor) -> float:
    both, either = (seen & asked).sum((1, 2)), (seen | asked).sum((1, 2))
    return float((both / either.clamp(min=1)).mean())


def _psnr_figures(found: Drawn, where: Tensor) -> dict[str, float]:
    others = [_psnr(found.images, found.real.roll(shift, 0), where) for shift in range(1, 9)]
    return {
        "model": _psnr(found.images, found.real, where),
        "chance": sum(others) / len(others),
        "first_stage": _psnr(found.decoded, found.real, where),
    }


def _psnr(images: Tensor, real: Tensor, where: Tensor) -> float:
    """Decibels of the range 2, of the mean over images of the mean squared error where `where` is true."""
    squared = ((images - real).square() * where).sum((1, 2, 3)) / where.sum((1, 2, 3)).clamp(min=1)
    return 10 * math.log10(4 / float(squared.mean()))


def _enlarged(small: Tensor) -> Tensor:
    """[3,h,w] in [-1,1] -> [3,S,S] by Pillow's bicubic filter."""
    pixels = ((small + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    large = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(large)).permute(2, 0, 1).float() / 127.5 - 1


def _sheet(task: str, found: Drawn) -> np.ndarray:
    """Rows of pictures: the condition where it is a picture, what was drawn, what is real (unconditional: nothing)."""
    shown = slice(0, SHOWN)
    rows = [to_uint8(found.images[shown])]
    if task != "unconditional_small":
        rows.append(to_uint8(found.real[shown]))
    condition = None
    if task == "layout_small":
        condition = np.stack([_drawn_boxes(listed) for listed in _boxes(found)[shown]])
    elif task == "semantic_small":
        colours = np.array(list(PALETTE.values()), np.uint8)
        condition = colours[found.batch["spatial"][shown].numpy()]
    elif task == "superres_small":
        condition = to_uint8(functional.interpolate(found.batch["spatial"][shown], size=(SIZE, SIZE)))
    elif task == "inpainting_small":
        condition = to_uint8(torch.where(found.batch["mask"][shown].bool(), 0.0, found.real[shown]))
    if condition is not None:
        rows.insert(0, condition)
    pictures = np.concatenate(rows).repeat(ZOOM, 1).repeat(ZOOM, 2)
    return tile(pictures, SHOWN)


def _drawn_boxes(boxes: Sequence[Box]) -> np.ndarray:
    colours = list(PALETTE.values())
    picture = np.full((SIZE, SIZE, 3), 255, np.uint8)
    for box in boxes:
        left, top, right, bottom = _pixels(box)
        picture[top:bottom, left:right] = colours[1 + box.label % (len(colours) - 1)]
    return picture
