"""scheduler_config.json of diffusers, both ways: the noise schedule and what the network predicts, whatever the sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldmscale.config import DiffusionConfig
from ldmscale.errors import DataError

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
