"""What the configuration files of models in other formats decide, before anything is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ldmscale.checkpoint.run_folder import RunFolder, is_foreign
from ldmscale.config import AutoencoderConfig, AutoencoderJob, DiffusionJob
from ldmscale.config.checks.warm_start import unfitting
from ldmscale.config.typed import differences, plain_part
from ldmscale.errors import ConfigError
from ldmscale.interop.described import described

# Of the training alone, or of what the weights do not depend on.
FREE = ("dropout", "checkpointing", "commitment")


def with_stated_first_stage(config: DiffusionJob) -> tuple[DiffusionJob, list[str]]:
    """The configuration with the autoencoder that `first_stage.path` describes, and what changed by that.

    Raises ConfigError where its latents are not those that the rest of the configuration is made for.
    """
    path, configured = config.first_stage.path, config.autoencoder
    if path is None or configured.kind == "pixels" or not is_foreign(Path(path)):
        return config, []
    stated = described(Path(path)).get("autoencoder")
    if not isinstance(stated, AutoencoderConfig):
        return config, []
    faults = [
        f"{name} of the configured autoencoder is {here}, and that of first_stage.path={path} {there}: give the autoencoder= "
        "that it is of"
        for name, here, there in (
            ("the number of latent channels", configured.latent_width, stated.latent_width),
            ("the factor", configured.factor, stated.factor),
        )
        if here != there
    ]
    if faults:
        raise ConfigError(faults)
    found = differences(plain_part(stated), plain_part(configured))
    taken = {key: getattr(stated, key) for key in found if key not in FREE}
    notes = [
        f"autoencoder.{key} is {there!r}, as {path} states, in place of {here!r}"
        for key, (there, here) in found.items()
        if key in taken
    ]
    return replace(config, autoencoder=replace(configured, **taken)), notes


def check_stated_warm_start(config: AutoencoderJob | DiffusionJob) -> None:
    """Raise ConfigError where the files of a foreign `warm_start.path` describe weights of other shapes."""
    path = config.warm_start.path
    begun = any(RunFolder(config.run.dir).checkpoints.glob("step_*/COMPLETE"))
    if path is None or begun or not is_foreign(Path(path)):
        return
    parts = {name: plain_part(part) for name, part in described(Path(path)).items()}
    if "spatial_rescaler" in parts:
        parts["spatial"] = parts.pop("spatial_rescaler")
    trained = "autoencoder" if isinstance(config, AutoencoderJob) else "unet"
    if trained in parts and (faults := unfitting(parts, config, path)):
        raise ConfigError(faults)
