"""`sample`: images for prompts, the same image for the same prompt and seed whatever the batch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmscale.data.conditions.annotations import ClassLabels
from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.diffusion.sample_latents import (
    Given,
    Negative,
    SamplerOptions,
    draw_latents,
    starting_noise,
    steps_of_strength,
)
from ldmscale.diffusion.timesteps import SAMPLERS, SPACINGS, path_of
from ldmscale.errors import ConfigError, DataError
from ldmscale.inference.parts import Parts
from ldmscale.models.conditions import Conditions
from ldmscale.models.tiling import decode_in_tiles, encode_in_tiles

log = logging.getLogger(__name__)


@torch.no_grad()
def sample(
    parts: Parts,
    prompts: str | Sequence[str],
    steps: int = 50,
    sampler: str = "ddim",
    guidance: float = 5.0,
    seeds: Sequence[int] | None = None,
    noise: Tensor | None = None,
    eta: float = 0.0,
    conditions: Conditions | None = None,
    *,
    negative_prompts: str | Sequence[str] | None = None,
    guidance_rescale: float = 0.0,
    spacing: str | None = None,
    height: int | None = None,
    width: int | None = None,
    image: Tensor | None = None,
    strength: float | None = None,
    mask: Tensor | None = None,
    decode_tile_pixels: int | None = None,
    spatial_guidance: float = 1.0,
) -> Tensor:
    """Draw one image for each prompt.

    Args:
        parts: a diffusion model (`load`), all parts on one device.
        prompts: captions, or one; of a class-conditional model names or numbers of classes; of an unconditional one as many texts
            as images are wanted, which are not read.
        steps: of the sampler. sampler: "ddim", "ddpm", "plms", "dpmpp_2m" or "euler".
        guidance: 1 follows the caption as trained; more follows it more closely (Ho and Salimans 2022).
        seeds: one for each prompt; 0, 1, 2 ... unless given.
        noise: float32 [N,C,h,w] to start from, in place of the seeds'.
        eta: of ddim; 0 is deterministic; 1 adds the noise of DDPM.
        conditions: of as many samples, for a model that reads other things than captions; the prompts are then not read.
            What is joined to the latent gives height and width.
        negative_prompts: what guidance moves away from, one for all or one for each prompt; "" and None are the
            model's null condition.
        guidance_rescale: share of the guided prediction that gets back the spread of the conditional one, 0 to 1
            (Lin et al. 2023).
        spacing: of the timesteps, "leading", "trailing" or "linspace"; the sampler's published one unless given.
        height, width: of the images in pixels; those that the model was trained at unless given.
        image: float [N,3,H,W] or [1,3,H,W] in [-1,1], to start from; gives height and width.
        strength: share of the steps that are followed from the image, 1 keeps next to nothing of it; 0.75 (as CompVis)
            unless given, and 1 with a mask.
        mask: [N,1,H,W] or [1,1,H,W], above 0.5 where the image is drawn anew; the rest comes back as it is.
        decode_tile_pixels: side of the tiles in which images with more pixels are decoded, and encoded, in the memory of
            one tile and without seams (models/tiling.py); whole unless given.
        spatial_guidance: the scale of what is joined to the latent, beside `guidance` for the context (diffusion/guidance.py);
            1 follows it as trained.

    Returns:
        float32 [N,3,H,W] in [-1,1] on the CPU.

    Raises:
        ConfigError: the model has no part that sampling needs, or arguments that do not fit it or each other.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ConfigError("prompts is empty: give a caption, or a list of one for each image")
    if conditions is None and parts.layout is not None:
        raise ConfigError(
            "the model reads layouts, and prompts tell none: give conditions=Conditions(token_ids=...) of parts.layout.encode"
        )
    if conditions is None and parts.denoiser is not None and parts.denoiser.embeddings is not None:
        raise ConfigError(
            "the model reads embeddings, and prompts tell none: give conditions=Conditions(embeddings=...)"
        )
    if missing := missing_parts(parts, prompted=conditions is None):
        raise ConfigError(missing)
    assert parts.denoiser and parts.autoencoder
    assert parts.schedule and parts.scale and parts.latent_shape
    weight = next(parts.denoiser.parameters())
    options = SamplerOptions(
        steps, guidance, eta, parts.prediction, sampler, spacing, guidance_rescale, spatial_guidance
    )
    size = _size(parts, height, width, image, conditions)
    strength = (0.75 if mask is None else 1.0) if strength is None else strength
    faults = [
        *_sampler_faults(options, parts.schedule),
        *_image_faults(parts, size, len(prompts), image, mask),
        *_guidance_faults(parts, spatial_guidance),
    ]
    factor = parts.autoencoder.downsampling
    shape = (parts.latent_shape[0], size[0] // factor, size[1] // factor)
    if noise is not None and tuple(noise.shape) != (len(prompts), *shape):
        faults.append(f"noise has the shape {tuple(noise.shape)}; expected {(len(prompts), *shape)}")
    if any(part is not None and len(part) != len(prompts) for part in conditions or ()):
        faults.append(f"conditions are not of {len(prompts)} samples, as many as prompts: give one for each")
    negatives = _per_prompt(negative_prompts, len(prompts))
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    for name, given in (("seeds", seeds), ("negative_prompts", negatives)):
        if given is not None and len(given) != len(prompts):
            faults.append(f"{name} has {len(given)} entries for {len(prompts)} prompts: give one for each")
    if negatives is not None and any(negatives):
        if parts.tokenizer is None or parts.text_encoder is None:
            faults.append("negative_prompts: the model reads no captions; give none")
        elif guidance == spatial_guidance == 1:
            faults.append(
                "negative_prompts with guidance=1: nothing moves away from them; give guidance=5, or none"
            )
    if image is not None:
        try:
            steps_of_strength(steps, strength)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(faults)
    if (
        parts.denoiser.has_null
        and parts.caption_dropout == 0
        and guidance != 1
        and not (negatives and all(negatives))
    ):
        _warn_once(
            f"guidance={guidance:g} moves away from the null condition, which this model never saw in training "
            "(diffusion.caption_dropout=0): such images are seldom good; give guidance=1, or negative prompts that mean something"
        )
    if conditions is None:
        conditions = conditions_of(parts, prompts)
    conditions = conditions.to(weight.device)
    start = starting_noise(seeds, shape) if noise is None else noise
    latents = draw_latents(
        parts.denoiser,
        conditions,
        start.to(weight.device),
        parts.schedule,
        options,
        weight.dtype,
        seeds,
        _negative(parts, negatives, conditions),
        None if image is None else _given(parts, image, strength, mask, len(prompts), decode_tile_pixels),
    )
    latents = parts.scale.unscale(latents)
    if (decoder := next(parts.autoencoder.parameters(), None)) is not None:
        latents = latents.to(decoder.dtype)
    if decode_tile_pixels is None:
        images = parts.autoencoder.decode(latents)
    else:
        images = decode_in_tiles(parts.autoencoder, latents, decode_tile_pixels)
    images = images.float().clamp(-1, 1).cpu()
    if image is None or mask is None:
        return images
    return torch.where(mask.cpu() > 0.5, images, image.float().cpu())


def conditions_of(parts: Parts, prompts: Sequence[str], spatial: Tensor | None = None) -> Conditions:
    """What prompts, and `spatial` for what is joined to the latent, tell this model, on the CPU.

    Raises:
        ConfigError: a prompt names no class, or the model reads something that prompts cannot give.
    """
    joined = (
        parts.denoiser is not None and parts.denoiser.unet.in_channels != parts.denoiser.unet.out_channels
    )
    if joined and spatial is None:
        raise ConfigError(
            "the model reads channels joined to its latent: give conditions=Conditions(spatial=...)"
        )
    return _prompt_conditions(parts, prompts)._replace(spatial=spatial)


def _prompt_conditions(parts: Parts, prompts: Sequence[str]) -> Conditions:
    if parts.tokenizer is not None and parts.text_encoder is not None:
        return Conditions(torch.from_numpy(parts.tokenizer.encode(list(prompts))))
    if parts.class_embedder is None:
        return Conditions()
    classes = parts.classes or ClassLabels("cls", parts.class_embedder.classes)
    try:
        return Conditions(labels=torch.tensor([classes.number(prompt) for prompt in prompts]))
    except DataError as error:
        raise ConfigError([f"prompts: {fault}" for fault in error.faults]) from error


def missing_parts(parts: Parts, prompted: bool = True) -> list[str]:
    """What a model lacks to be drawn from (by prompts, or by conditions that are given), each with its remedy."""
    remedies = {
        "denoiser": "give a diffusion model with all that reads its condition",
        "autoencoder": "train with first_stage.path=FOLDER, or import it with its first stage",
        "schedule": "import it with diffusion=NAME, or config= of its yaml",
        "scale": "import it with scale_factor=N, or config= of its yaml",
        "latent_shape": "import it with latent_size=N, the height and width of its latents",
    }
    if prompted and parts.text_encoder is not None:
        remedies["tokenizer"] = "import it with tokenizer=NAME_OR_FOLDER"
        if parts.tokenizer is None:
            del remedies["denoiser"]  # for want of the null condition, which is the empty caption
    return [
        f"the model has no {name.replace('_', ' ')}: {remedy}"
        for name, remedy in remedies.items()
        if getattr(parts, name) is None
    ]


@functools.cache
def _warn_once(text: str) -> None:
    """A set is drawn in many calls: the same is said once a process."""
    log.warning(text)


def size_step(parts: Parts) -> int:
    """Height and width of images are multiples of this many pixels: of the first stage's factor and the U-Net's levels."""
    assert parts.autoencoder and parts.unet
    factor: int = parts.autoencoder.downsampling
    return factor * int(2 ** (len(parts.unet.down_blocks) - 1))


def _size(
    parts: Parts, height: int | None, width: int | None, image: Tensor | None, conditions: Conditions | None
) -> tuple[int, int]:
    assert parts.autoencoder and parts.latent_shape
    if image is not None:
        return (height or image.shape[-2], width or image.shape[-1])
    factor: int = parts.autoencoder.downsampling
    if conditions is not None and conditions.spatial is not None:
        rescaler = parts.spatial_rescaler
        halved = 1 if rescaler is None else 2**rescaler.halvings
        wide, high = (conditions.spatial.shape[axis] // halved * factor for axis in (-1, -2))
        return (height or high, width or wide)
    return (height or parts.latent_shape[1] * factor, width or parts.latent_shape[2] * factor)


def _sampler_faults(options: SamplerOptions, schedule: NoiseSchedule) -> list[str]:
    faults = []
    if options.sampler not in SAMPLERS:
        return [f"sampler={options.sampler!r}: expected {', '.join(SAMPLERS)}"]
    if options.spacing is not None and options.spacing not in SPACINGS:
        return [f"spacing={options.spacing!r}: expected {', '.join(SPACINGS)}"]
    if options.eta and options.sampler != "ddim":
        faults.append(f"eta={options.eta} is a setting of ddim; {options.sampler} has none: give eta=0")
    try:
        path_of(options.sampler, schedule, options.steps, options.spacing)
    except ValueError as error:
        faults.append(str(error))
    return faults


def _guidance_faults(parts: Parts, spatial_guidance: float) -> list[str]:
    if spatial_guidance == 1:
        return []
    if parts.spatial is None:
        return [
            f"spatial_guidance={spatial_guidance}, but nothing is joined to the latent of this model: give 1"
        ]
    if parts.spatial_dropout == 0:  # what another format holds does not say
        return [
            f"spatial_guidance={spatial_guidance}, but the model always saw what is joined to its latent: train it with "
            "diffusion.spatial_dropout=0.1, or give 1"
        ]
    return []


def _image_faults(
    parts: Parts, size: tuple[int, int], count: int, image: Tensor | None, mask: Tensor | None
) -> list[str]:
    faults = []
    step = size_step(parts)
    for name, value in zip(("height", "width"), size, strict=True):
        if value < step or value % step:
            near = max(step, round(value / step) * step)
            faults.append(f"{name}={value}: expected a multiple of {step} pixels; give {name}={near}")
    if mask is not None and image is None:
        faults.append("a mask was given without an image: give the image that is to be redrawn there")
    for name, tensor, channels in (("image", image, 3), ("mask", mask, 1)):
        if tensor is not None and (
            tensor.dim() != 4
            or tensor.shape[0] not in (1, count)
            or tuple(tensor.shape[1:]) != (channels, *size)
        ):
            faults.append(
                f"{name} has the shape {tuple(tensor.shape)}; expected [{count} or 1, {channels}, {size[0]}, {size[1]}]"
            )
    return faults


def _per_prompt(given: str | Sequence[str] | None, count: int) -> list[str] | None:
    if given is None:
        return None
    return [given] * count if isinstance(given, str) else list(given)


def _negative(parts: Parts, negatives: list[str] | None, conditions: Conditions) -> Negative | None:
    """None where every negative prompt is empty: that is the null condition."""
    if negatives is None or not any(negatives):
        return None
    assert parts.tokenizer and conditions.token_ids is not None
    device = conditions.token_ids.device
    token_ids = torch.from_numpy(parts.tokenizer.encode(negatives)).to(device)
    return Negative(
        conditions._replace(token_ids=token_ids),
        torch.tensor([not text for text in negatives], device=device),
    )


def _given(
    parts: Parts, image: Tensor, strength: float, mask: Tensor | None, count: int, tile_pixels: int | None
) -> Given:
    assert parts.autoencoder and parts.scale and parts.denoiser
    like = next(parts.autoencoder.parameters(), next(parts.denoiser.parameters()))
    image = image.to(like.device, like.dtype)
    if tile_pixels is None:
        moments = parts.autoencoder.encode(image).moments()
    else:
        moments = encode_in_tiles(parts.autoencoder, image, tile_pixels)
    # The mean of the posterior, not a draw of it: the image belongs to its prompt and seed alone.
    latent = moments[:, : parts.autoencoder.latent_channels]
    latent = parts.scale.scale(latent.float()).expand(count, -1, -1, -1)
    redraw = None
    if mask is not None:
        # A position of the latent that the hole touches is redrawn.
        holes = F.max_pool2d((mask > 0.5).float(), parts.autoencoder.downsampling)
        redraw = holes.to(latent.device).expand(count, -1, -1, -1)
    return Given(latent, strength, redraw)
