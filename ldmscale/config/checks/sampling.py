"""Faults of what is to be drawn: sampler, sizes, prompts and pictures beside the model that draws."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.config import ExportJob, ImportJob, SampleConfig
from ldmscale.config.checks.data import check_folder, check_local
from ldmscale.config.checks.stages import check_model
from ldmscale.data.images.decode import image_header
from ldmscale.errors import DataError


def check_sample(sample: SampleConfig) -> list[str]:
    """Every fault of `ldmscale sample` that can be seen without the model's weights."""
    given = Path(sample.model)
    # A checkpoint of a run will do, too.
    run = given.parent.parent if given.name.startswith("step_") and (given / "COMPLETE").is_file() else given
    faults = check_model(str(run), "sample.model")
    faults += [*_check_guidance(sample), *_check_pictures(sample), *_check_aspect_ratio(sample)]
    if sample.prompts is None and sample.condition is None:
        faults.append(
            "sample.prompts is not set: give 'sample.prompts=[a red dragon]', a file, or - for standard input"
        )
    if sample.out is not None:
        faults += check_local("sample.out", sample.out)
    elif given.is_file():
        faults.append(
            f"sample.out is not set, and sample.model={sample.model} is no folder: give sample.out=FOLDER"
        )
    if sample.eta and sample.sampler != "ddim":
        faults.append(
            f"sample.eta={sample.eta} is a setting of ddim, and sample.sampler={sample.sampler}: give sample.eta=0"
        )
    if not RunFolder(run).config_file.is_file():
        return faults  # no run: what other formats can draw is known when they have been read
    model = RunFolder(run).config()
    if model.get("job") != "diffusion":
        return [
            *faults,
            f"sample.model={sample.model} is a run of {model.get('job')!r}: give the folder of a diffusion run",
        ]
    return [
        *faults,
        *_check_path(sample, model),
        *_check_size(sample, model),
        *_check_condition(sample, model),
        *_check_spatial_guidance(sample, model),
        *_check_negatives(sample, model),
    ]


def _check_condition(sample: SampleConfig, model: dict[str, Any]) -> list[str]:
    """Files where the model reads a condition that prompts cannot give, and only there."""
    spatial = model.get("spatial")
    told = [name for name in ("layout", "embeddings") if model.get(name) is not None]
    if spatial is not None and told:
        return [
            f"the model reads {told[0]} and a spatial condition, and files give one of them: draw it from Python, by "
            "sample(..., conditions=Conditions(...))"
        ]
    reads = f"spatial.kind={spatial['kind']}" if spatial is not None else next(iter(told), None)
    if reads is None:
        return (
            []
            if sample.condition is None
            else ["sample.condition is set, but the model reads none from files: remove it"]
        )
    if sample.condition is None:
        return [
            f"sample.condition is not set, and the model reads one ({reads}): give a folder or a list of files"
        ]
    faults = [
        f"sample.{name} is set, but what sample.condition names gives the size and all that is kept: remove it"
        for name in ("height", "width", "image", "mask")
        if spatial is not None and getattr(sample, name) is not None
    ]
    listed = (sample.condition,) if isinstance(sample.condition, str) else sample.condition
    if missing := [path for path in listed if not Path(path).exists()]:
        faults.append(
            f"sample.condition: there is no {missing[0]} ({len(missing)} missing): give a folder or files"
        )
    return faults


def _check_guidance(sample: SampleConfig) -> list[str]:
    faults = []
    negatives = sample.negative_prompts
    if negatives and sample.guidance == 1:
        faults.append(
            "sample.negative_prompts with sample.guidance=1: without guidance nothing moves away from them; give "
            "sample.guidance=5, or no negative prompts"
        )
    prompts = sample.prompts
    if isinstance(negatives, tuple) and isinstance(prompts, tuple) and len(negatives) != len(prompts):
        faults.append(
            f"sample.negative_prompts has {len(negatives)} entries for {len(prompts)} prompts: give one for "
            "each, or one text for all"
        )
    return faults


def _check_negatives(sample: SampleConfig, model: dict[str, Any]) -> list[str]:
    if not sample.negative_prompts or (model.get("text_encoder") and model.get("layout") is None):
        return []
    return ["sample.negative_prompts is set, but the model reads no captions: remove it"]


def _check_spatial_guidance(sample: SampleConfig, model: dict[str, Any]) -> list[str]:
    """Guidance needs the prediction of a model that does not see the condition."""
    given = f"sample.spatial_guidance={sample.spatial_guidance}"
    if sample.spatial_guidance == 1:
        return []
    if model.get("spatial") is None:
        return [f"{given}, but nothing is joined to this model's latent: give sample.spatial_guidance=1"]
    if not model["diffusion"].get("spatial_dropout"):
        return [
            f"{given}, but the model always saw what is joined to its latent (diffusion.spatial_dropout=0): give "
            "sample.spatial_guidance=1, or train it with diffusion.spatial_dropout=0.1"
        ]
    return []


def _check_pictures(sample: SampleConfig) -> list[str]:
    faults = [
        f"sample.{name}={path}: there is no such file; give the path of a picture"
        for name, path in (("image", sample.image), ("mask", sample.mask))
        if path is not None and not Path(path).is_file()
    ]
    if not faults and sample.image is not None:
        faults += _check_shapes(sample.image, sample.mask, (sample.width or 1, sample.height or 1))
    if sample.mask is not None and sample.image is None:
        faults.append(
            "sample.mask is set without sample.image: give the picture that is redrawn where it is white"
        )
    if sample.strength is not None:
        if sample.image is None:
            faults.append("sample.strength is set without sample.image: give the picture that it changes")
        if not 0 < sample.strength <= 1:
            faults.append(f"sample.strength={sample.strength}: expected more than 0 and at most 1")
        elif int(sample.steps * sample.strength) < 1:
            faults.append(
                f"sample.strength={sample.strength} of sample.steps={sample.steps} is less than one step: give "
                f"sample.strength={1 / sample.steps:.3g} or more"
            )
    return faults


def _check_shapes(image: str, mask: str | None, drawn: tuple[int, int]) -> list[str]:
    """Both are scaled and cut to what is drawn: a mask of neither's shape would lie elsewhere.

    Args:
        drawn: width and height; 1 by 1 where the model draws its own size, a square.
    """
    faults: list[str] = []
    sizes: list[tuple[int, int]] = []
    for key, path in (("image", image), ("mask", mask)):
        if path is None:
            continue
        try:
            header = image_header(Path(path).read_bytes())
            sizes.append((header.width, header.height))
        except (OSError, DataError) as error:
            faults.append(f"sample.{key}={path} cannot be read as an image: {error}")
    if len(sizes) == 2 and not any(_alike(sizes[1], other) for other in (sizes[0], drawn)):
        (width, height), (across, down) = sizes
        faults.append(
            f"sample.mask={mask} has {across}x{down} pixels, and sample.image={image} {width}x{height}: give a mask of the shape "
            "of the image, or of what is drawn"
        )
    return faults


def _alike(mask: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the mask, scaled to the other's width, has its height to within a pixel of the mask."""
    return abs(mask[0] * other[1] / other[0] - mask[1]) < 1


def _check_path(sample: SampleConfig, model: dict[str, Any]) -> list[str]:
    """The sampler's timesteps; `diffusion.spacing.path_of` refuses the same."""
    diffusion = model["diffusion"]
    most = int(diffusion["timesteps"]) - (sample.sampler != "ddpm")
    faults = []
    if sample.steps > most:
        faults.append(
            f"sample.steps={sample.steps}: the model has {diffusion['timesteps']} timesteps; give 1 to {most}"
        )
    if diffusion.get("zero_terminal_snr", False):
        if sample.sampler == "plms":
            faults.append(
                "sample.sampler=plms: it works on the noise alone, and this model's last timestep has no signal "
                "(diffusion.zero_terminal_snr); give sample.sampler=ddim or dpmpp_2m"
            )
        if sample.spacing == "leading":
            faults.append(
                "sample.spacing=leading: it begins before the last timestep, which this model was trained to begin at "
                "(diffusion.zero_terminal_snr); give sample.spacing=trailing"
            )
    return faults


def _check_aspect_ratio(sample: SampleConfig) -> list[str]:
    given = [name for name in ("height", "width", "image", "condition") if getattr(sample, name) is not None]
    if sample.aspect_ratio is None or not given:
        return []
    return [
        f"sample.aspect_ratio={sample.aspect_ratio:g} and sample.{given[0]} both give the shape of the images: remove one"
    ]


def _check_size(sample: SampleConfig, model: dict[str, Any]) -> list[str]:
    step = 2 ** (len(model["autoencoder"]["channel_mult"]) + len(model["unet"]["channel_mult"]) - 2)
    return [
        f"sample.{name}={value}: the networks halve it down to one pixel in {step}; give a multiple, "
        f"sample.{name}={max(1, round(value / step)) * step}"
        for name, value in (("height", sample.height), ("width", sample.width))
        if value is not None and value % step
    ]


def check_places(config: ImportJob | ExportJob) -> list[str]:
    """Source there, destination not inside or around it."""
    faults = []
    src, dst = (
        Path(os.path.realpath(path)) for path in (config.src, config.dst)
    )  # links in a circle stay as they are
    if not src.exists():
        faults.append(f"src={config.src}: there is no such file or folder")
    if src == dst or src in dst.parents or dst in src.parents:
        faults.append(f"dst={config.dst} and src={config.src} lie in one another: give a dst elsewhere")
    faults += check_folder("dst", dst.parent)
    return faults


def check_import(config: ImportJob) -> list[str]:
    faults = check_places(config)
    if (Path(config.src) / "run.json").is_file():
        faults.append(f"src={config.src} is a run of ldmscale: sample.model= and export take it as it is")
    if config.config is not None and not Path(config.config).is_file():
        faults.append(f"config={config.config}: there is no such file; give CompVis' yaml of the checkpoint")
    if Path(config.dst).is_file():
        faults.append(f"dst={config.dst} is a file: an imported model is a folder")
    return faults


def check_export(config: ExportJob) -> list[str]:
    faults = check_places(config)
    if not faults:
        faults += check_model(config.src, "src")
    if config.format == "diffusers" and Path(config.dst).suffix in (".ckpt", ".safetensors"):
        faults.append(f"dst={config.dst}: diffusers models are folders; give a folder, or format=compvis")
    return faults
