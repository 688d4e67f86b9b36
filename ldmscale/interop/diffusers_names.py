"""Names of our weights in diffusers' UNet2DConditionModel, UNet2DModel, AutoencoderKL, VQModel and LDMBertModel.

Most names are the same on purpose; what differs is below, applied in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ldmscale.config import DiffusionConfig
from ldmscale.errors import DataError
from ldmscale.interop.tensors import Slot

_NETWORK = (
    (r"^((?:encoder\.)?down_blocks\.\d+)\.resample\.", r"\1.downsamplers.0."),
    (r"^((?:decoder\.)?up_blocks\.\d+)\.resample\.", r"\1.upsamplers.0."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.proj_in\.", ".ff.net.0.proj."),
    (r"\.ff\.proj_out\.", ".ff.net.2."),
    (r"^quantize\.embedding$", "quantize.embedding.weight"),
)
# Attention blocks of files from before diffusers 0.17, which diffusers still reads.
_OLD_ATTENTION = (
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn."),
)
_TEXT = (
    (r"\.to_([qkv])\.", r".\1_proj."),
    (r"\.to_out\.", ".out_proj."),
    (r"^", "model."),
)


def network_slots(
    names: Sequence[str], linear_projection: bool = False, old_attention: bool = False
) -> list[Slot]:
    """The slots of a U-Net or an autoencoder. `linear_projection`: what use_linear_projection in config.json says."""
    rules = _NETWORK + (_OLD_ATTENTION if old_attention else ())
    slots = []
    for name in names:
        projection = re.search(r"\.attentions\.\d+\.proj_(in|out)\.weight$", name)
        convolution = projection is not None and not linear_projection
        slots.append(Slot(_renamed(name, rules), (name,), "conv2" if convolution else "same"))
    return slots


def text_slots(names: Sequence[str]) -> list[Slot]:
    """The slots of LDMBertModel."""
    return [Slot(_renamed(name, _TEXT), (name,)) for name in names]


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# diffusers' names of schedules and predictions to ours.
SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def schedule_config(values: Mapping[str, Any]) -> DiffusionConfig:
    """Of scheduler_config.json, whatever the sampler. Raises DataError for a schedule that we do not have."""
    faults = []
    kind, prediction = values.get("beta_schedule", "linear"), values.get("prediction_type", "epsilon")
    if kind not in SCHEDULES:
        faults.append(f"beta_schedule={kind!r}: only {', '.join(SCHEDULES)} can be read")
    if prediction not in PREDICTIONS:
        faults.append(f"prediction_type={prediction!r}: only {', '.join(PREDICTIONS)} can be read")
    if values.get("trained_betas"):
        faults.append("trained_betas is set: such a schedule cannot be read")
    if faults:
        raise DataError([f"scheduler: {fault}" for fault in faults])
    return DiffusionConfig(
        timesteps=values.get("num_train_timesteps", 1000),
        schedule=SCHEDULES[kind],  # type: ignore[arg-type]
        beta_start=values.get("beta_start", 1e-4),
        beta_end=values.get("beta_end", 2e-2),
        prediction=PREDICTIONS[prediction],  # type: ignore[arg-type]
        zero_terminal_snr=bool(values.get("rescale_betas_zero_snr", False)),
    )


def schedule_values(config: DiffusionConfig) -> dict[str, Any]:
    """scheduler_config.json of a DDIMScheduler that visits the steps of our DDIM, which are CompVis'.

    Without signal at the last timestep both begin there and end at a clean image (`diffusion.spacing.path_of`).
    """
    leading = not config.zero_terminal_snr
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.timesteps,
        "beta_schedule": next(k for k, v in SCHEDULES.items() if v == config.schedule),
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "prediction_type": next(k for k, v in PREDICTIONS.items() if v == config.prediction),
        "clip_sample": False,
        "set_alpha_to_one": not leading,
        "steps_offset": 1 if leading else 0,
        "timestep_spacing": "leading" if leading else "trailing",
        "thresholding": False,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
    }
