"""CompVis' yaml beside a checkpoint, both ways: what the tensors do not tell (heads, schedule, latent scale)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ldmscale.config import ClassEmbedderConfig, DiffusionConfig, ImportedUNetConfig, SpatialConfig
from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.errors import DataError
from ldmscale.interop.limits import DEEPEST, check_values
from ldmscale.interop.model import Model

# Names of schedules there and here: CompVis' "linear" is linear in the square root of beta.
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}
MOST_TIMESTEPS = 100_000
_LONGEST_YAML = 1 << 20  # bytes
_MOST_ALIASES = 100
PREDICTIONS = {"eps": "eps", "x0": "x0"}


@dataclass(frozen=True)
class Hints:
    """What a configuration says beyond the tensors; None where it does not."""

    heads: int | None = None
    head_channels: int | None = None
    text_heads: int | None = None
    text_head_channels: int | None = None
    diffusion: DiffusionConfig | None = None
    scale_factor: float | None = None
    latent_size: int | None = None
    dropout: float = 0.0
    halvings: int | None = None  # of a map, by the spatial rescaler
    class_names: tuple[str, ...] | None = None
    null_class: bool | None = None  # whether the last row of the table of classes stands for none


def read_hints(values: Mapping[str, Any], where: str) -> Hints:
    """Hints out of a CompVis configuration (`model: {target, params}`); one of another kind says nothing.

    Raises DataError for settings that our networks cannot follow.
    """
    params = _at(values, "model", "params") or _at(values, "params") or values
    unet = _at(params, "unet_config", "params")
    if unet is None:
        return Hints()
    faults: list[str] = []
    for key, neutral in (
        ("conv_resample", True),
        ("dims", 2),
        ("use_new_attention_order", False),
        ("n_embed", None),
    ):
        if unet.get(key, neutral) != neutral:
            faults.append(f"{where}: unet_config.{key}={_short(unet[key])}: only {neutral!r} can be read")
    schedule = params.get("beta_schedule", "linear")
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        faults.append(f"{where}: beta_schedule={_short(schedule)}: only {', '.join(SCHEDULES)} can be read")
    prediction = params.get("parameterization", "eps")
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        faults.append(
            f"{where}: parameterization={_short(prediction)}: only {', '.join(PREDICTIONS)} can be read"
        )
    text = _at(params, "cond_stage_config", "params") or {}
    own = _at(values, "ldmscale") or {}

    def number(
        of: Mapping[str, Any], key: str, default: Any, low: float, high: float, whole: bool = False
    ) -> Any:
        value = of.get(key, default)
        if value is None or (value == default and not isinstance(value, bool)):
            return value
        kind: Any = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            faults.append(
                f"{where}: {key}={_short(value)}: expected a {'whole ' if whole else ''}number from {low:g} to {high:g}"
            )
            return default
        return value

    # Where there is none, CompVis writes -1.
    heads, size = (number(unet, key, -1, 1, 1 << 20, True) for key in ("num_heads", "num_head_channels"))
    text_heads, text_size = (number(text, key, None, 1, 1 << 20, True) for key in ("heads", "dim_head"))
    halvings = number(text, "n_stages", None, 0, 20, True)
    timesteps = number(params, "timesteps", 1000, 1, MOST_TIMESTEPS, True)
    start, end = number(params, "linear_start", 1e-4, 0, 1), number(params, "linear_end", 2e-2, 0, 1)
    factor = number(params, "scale_factor", 1.0, -1e6, 1e6)
    dropout = number(unet, "dropout", 0.0, 0, 1)
    names = own.get("class_names") or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        faults.append(f"{where}: class_names={_short(names)}: expected a list of names")
    if faults:
        raise DataError(faults)
    by_std = bool(params.get("scale_by_std", False))  # then the factor is a tensor of the checkpoint
    return Hints(
        # Where both are given, the size of a head is what CompVis uses.
        heads=heads if heads != -1 and size == -1 else None,
        head_channels=size if size != -1 else None,
        text_heads=text_heads,
        text_head_channels=text_size,
        diffusion=DiffusionConfig(
            timesteps=timesteps,
            schedule=SCHEDULES[schedule],  # type: ignore[arg-type]
            beta_start=start,
            beta_end=end,
            prediction=prediction,
        ),
        scale_factor=None if by_std else float(factor),
        latent_size=params.get("image_size") if isinstance(params.get("image_size"), int) else None,
        dropout=float(dropout),
        halvings=halvings,
        null_class=None if own.get("null_class") is None else bool(own["null_class"]),
        class_names=tuple(names) or None,
    )


def _short(value: Any) -> str:
    """A value in a message: only what is one value is printed."""
    if (
        isinstance(value, (str, float, bool))
        or value is None
        or (isinstance(value, int) and abs(value) < 1 << 64)
    ):
        return repr(value) if len(str(value)) < 80 else f"{str(value)[:60]!r}..."
    return f"a {type(value).__name__}"


def find_yaml(checkpoint: Path) -> Path | None:
    """The yaml that lies beside a checkpoint: of the same name, or config.yaml, or the only -project.yaml of a run."""
    for candidate in (checkpoint.with_suffix(".yaml"), checkpoint.with_name("config.yaml")):
        if candidate.is_file():
            return candidate
    return None


def _check_tokens(text: str) -> None:
    """Raises ValueError for YAML that grows without a bound when it is read: aliases of aliases, and depth."""
    aliases = depth = 0
    for token in yaml.scan(text):
        aliases += isinstance(token, yaml.AliasToken)
        name = type(token).__name__
        depth += name.endswith("StartToken") and not name.startswith("Stream")
        depth -= name.endswith(("SequenceEndToken", "MappingEndToken", "BlockEndToken"))
        if aliases > _MOST_ALIASES:
            raise ValueError(f"it has more than {_MOST_ALIASES} aliases")
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")


def load_yaml(path: Path) -> dict[str, Any]:
    """Raises DataError where it is no mapping."""
    try:
        if path.stat().st_size > _LONGEST_YAML:
            raise ValueError(f"it has more than {_LONGEST_YAML:,} bytes")
        text = path.read_text(encoding="utf-8")
        _check_tokens(text)
        if "<<" in text:
            raise ValueError("it merges mappings (<<)")
        values = yaml.safe_load(text)
        if "${" in text:
            values = _resolved(values)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(
            f"{path} cannot be read as a configuration ({error}): give another config="
        ) from error
    check_values(values, str(path))
    if not isinstance(values, dict):
        raise DataError(
            f"{path} is no configuration: it holds a {type(values).__name__}; give another config="
        )
    return values


_INTERPOLATION = re.compile(r"\$\{([\w-]+(?:\.[\w-]+)*)\}")
_MOST_RESOLVED = 100_000  # values; references to sections that refer to sections multiply


def _resolved(values: Any) -> Any:
    """A configuration with the values that are `${key.of.the.file}` in their place, as OmegaConf resolves them.

    Resolvers (`${oc.env:HOME}`) and text around a reference stay as they are: they read the environment of this machine,
    and no setting that is read here is text. OmegaConf itself sets no limit to what references expand to.
    """
    left = _MOST_RESOLVED

    def resolve(value: Any, within: tuple[str, ...]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"its interpolations expand to more than {_MOST_RESOLVED:,} values")
        if isinstance(value, dict):
            return {key: resolve(each, within) for key, each in value.items()}
        if isinstance(value, list):
            return [resolve(each, within) for each in value]
        if not isinstance(value, str) or not (found := _INTERPOLATION.fullmatch(value.strip())):
            return value
        if found[1] in within:
            raise ValueError(f"the interpolation {value} refers to itself")
        target = values
        for key in found[1].split("."):
            if not isinstance(target, dict) or key not in target:
                raise ValueError(f"the interpolation {value} names no key of the file")
            target = target[key]
        return resolve(target, (*within, found[1]))

    return resolve(values, ()) if isinstance(values, dict) else values


def schedule_of(betas: Tensor) -> DiffusionConfig | None:
    """The schedule whose betas these float32 values [T] are; None if it is none that we know."""
    first, last = (float(str(np.float32(betas[i].item()))) for i in (0, -1))
    for kind in ("scaled_linear", "linear", "cosine"):
        if matches(betas, kind, first, last):
            start, end = (1e-4, 2e-2) if kind == "cosine" else (first, last)
            return DiffusionConfig(
                timesteps=len(betas),
                schedule=kind,
                beta_start=start,
                beta_end=end,
            )
    return None


def matches(betas: Tensor, kind: str, first: float, last: float) -> bool:
    """Whether the betas are those of this schedule, up to float32's rounding."""
    made = NoiseSchedule.make(kind, len(betas), first, last).alphas_bar
    found = torch.cumprod(1 - betas.double(), 0)
    return bool((made - found).abs().max() < 1e-5)


def written(model: Model) -> dict[str, Any]:
    """The configuration that CompVis' classes build this model from."""
    inner: dict[str, Any] = {}
    if (autoencoder := model.autoencoder) is not None:
        inner = {
            "target": f"ldm.models.autoencoder.{'AutoencoderKL' if autoencoder.kind == 'kl' else 'VQModelInterface'}",
            "params": {
                "embed_dim": autoencoder.latent_width,
                **_autoencoder(model),
            },
        }
    if (unet := model.unet) is None:
        return {"model": {**inner, "target": inner["target"].replace("Interface", "")}}
    params: dict[str, Any] = {}
    if (chosen := model.diffusion) is not None:
        params |= {
            "timesteps": chosen.timesteps,
            "beta_schedule": next(k for k, v in SCHEDULES.items() if v == chosen.schedule),
            "linear_start": chosen.beta_start,
            "linear_end": chosen.beta_end,
            "parameterization": chosen.prediction,
        }
    if model.factor is not None:
        params["scale_factor"] = model.factor
    if "scale_factor" in model.kept:
        params["scale_by_std"] = True
    params |= {
        "image_size": model.latent_size,
        "channels": unet.out_channels,
        "use_ema": model.parts["unet"].averaged is not None,
    }
    params["unet_config"] = {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "image_size": model.latent_size,
            "in_channels": unet.in_channels,
            "out_channels": unet.out_channels,
            "model_channels": unet.channels,
            "channel_mult": list(unet.channel_mult),
            "num_res_blocks": unet.blocks_per_level,
            "attention_resolutions": [2**level for level in unet.attention_levels],
            **_heads(model),
            "use_spatial_transformer": unet.context_dim is not None,
            **(
                {"context_dim": unet.context_dim, "transformer_depth": unet.transformer_depth}
                if unet.context_dim
                else {}
            ),
            "resblock_updown": unet.residual_updown,
            "use_scale_shift_norm": unet.scale_shift_norm,
            **({"num_classes": unet.num_classes} if unet.num_classes else {}),
            "dropout": unet.dropout,
            "legacy": False,
        },
    }
    if inner:
        params["first_stage_config"] = inner
    params |= _condition(model, unet)
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}} | _of_our_own(
        model
    )


def _condition(model: Model, unet: ImportedUNetConfig) -> dict[str, Any]:
    """What LatentDiffusion is told of the condition: what reads it, under which key of a batch, and how it enters.

    Without `conditioning_key` it would join any condition to the latent, and without `cond_stage_config` it does not start.
    """
    joined = unet.in_channels != unet.out_channels
    stage: str | dict[str, Any] = "__is_unconditional__"
    key = "image"  # of a batch: published names, some of which LatentDiffusion looks for
    if (text := model.text_encoder) is not None:
        fixed = (text.heads, text.head_channels) == (8, 64) and text.feedforward_mult == 4
        unknown = "text_encoder.heads" in model.unknown
        key = "caption"
        stage = {
            "target": "ldm.modules.encoders.modules.BERTEmbedder",
            "params": {
                "n_embed": text.width,
                "n_layer": text.layers,
                "vocab_size": text.vocab_size,
                "max_seq_len": text.max_tokens,
                # BERTEmbedder takes none of these: it says so, instead of drawing with other heads.
                **({} if fixed or unknown else {"heads": text.heads, "dim_head": text.head_channels}),
            },
        }
    elif "class_embedder" in model.parts:
        rows, width = model.parts["class_embedder"].weights["embedding.weight"].shape
        key = "class_label"
        stage = {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"n_classes": rows, "embed_dim": width, "key": key},
        }
    elif (spatial := model.parts.get("spatial_rescaler")) is not None:
        assert isinstance(spatial.config, SpatialConfig)
        known = "spatial_rescaler.halvings" not in model.unknown
        key = "segmentation"
        stage = {
            "target": "ldm.modules.encoders.modules.SpatialRescaler",
            "params": {
                **({"n_stages": spatial.config.halvings} if known else {}),
                "in_channels": spatial.config.map_classes,
                "out_channels": spatial.config.channels,
            },
        }
    elif joined and unet.in_channels == 2 * unet.out_channels + 1:
        stage, key = "__is_first_stage__", "masked_image"
    elif joined:
        stage, key = {"target": "torch.nn.Identity"}, "LR_image"
    elif unet.context_dim is not None:
        stage, key = {"target": "torch.nn.Identity"}, "embeddings"
    entered = [
        name for name, given in (("concat", joined), ("crossattn", unet.context_dim is not None)) if given
    ]
    found: dict[str, Any] = {"cond_stage_key": key}
    # Of a reader that was kept and not read, such as CLIP, nothing is known here: the class stops without it.
    if not any(name.startswith("cond_stage_model.") for name in model.kept) or stage == "__is_first_stage__":
        found["cond_stage_config"] = stage
    if entered:
        found["conditioning_key"] = "hybrid" if len(entered) == 2 else entered[0]
    return found


def _of_our_own(model: Model) -> dict[str, Any]:
    """What CompVis' classes have no setting for, beside `model`, where they do not look."""
    classes = model.parts.get("class_embedder")
    if classes is None:
        return {}
    assert isinstance(classes.config, ClassEmbedderConfig)
    names = {} if model.class_names is None else {"class_names": list(model.class_names)}
    return {"ldmscale": {"null_class": classes.config.null_class} | names}


def _heads(model: Model) -> dict[str, int | None]:
    """Nothing where they are not known: UNetModel does not start without them."""
    unet = model.unet
    if unet is None or "unet.heads" in model.unknown:
        return {}
    return {"num_heads": unet.heads} if unet.heads else {"num_head_channels": unet.head_channels}


def _autoencoder(model: Model) -> dict[str, Any]:
    config = model.autoencoder
    assert config is not None
    codebook = {} if config.kind == "kl" else {"n_embed": config.codebook_size}
    size = (
        model.latent_size or 32
    ) * config.factor  # of an image; CompVis finds the levels of attention by it
    return codebook | {
        "ddconfig": {
            "double_z": config.kind == "kl",
            "z_channels": config.latent_channels,
            "resolution": size,
            "in_channels": config.image_channels,
            "out_ch": config.image_channels,
            "ch": config.channels,
            "ch_mult": list(config.channel_mult),
            "num_res_blocks": config.blocks_per_level,
            "attn_resolutions": [size // 2**level for level in config.attention_levels],
            "dropout": config.dropout,
            **({} if config.mid_attention else {"attn_type": "none"}),
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }


def _at(values: Any, *keys: str) -> dict[str, Any] | None:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return dict(values) if isinstance(values, Mapping) else None
