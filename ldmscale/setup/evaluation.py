"""Evaluation: from a checked configuration to a measured result."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL
import torch

from ldmscale import __version__
from ldmscale.builders.feature_networks import open_distance, open_features
from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.config import EvaluateJob
from ldmscale.config.inherit import size_warning
from ldmscale.data.shards.urls import expand
from ldmscale.distributed.devices import arithmetic, fast_arithmetic
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.process_group import close_world, open_world
from ldmscale.errors import ConfigError, DataError
from ldmscale.evaluation.held_out import ImageSet, ReconstructionScores
from ldmscale.evaluation.metrics import FeatureSums, frechet_distance
from ldmscale.inference.load import load
from ldmscale.models.autoencoder import KLAutoencoder
from ldmscale.models.first_stage import digest
from ldmscale.setup.index import open_index
from ldmscale.storage.atomic import write_json
from ldmscale.tracking.logs import set_up_logging

log = logging.getLogger(__name__)


def evaluate(config: EvaluateJob, ranks: Ranks) -> None:
    """Measure the model as configured; rank 0 writes the result with its protocol to one JSON file. Collective."""
    world = open_world(ranks)
    fast_arithmetic(False)  # results are compared with those of other devices
    set_up_logging(None, ranks)
    if (differs := size_warning(config)) and ranks.is_main:
        log.warning("%s", differs)
    index = open_index(config.data.shards, config.data, ranks)
    images = ImageSet(index, config.data, min(config.evaluate.samples or index.total, index.total))
    if images.count < 1:
        raise DataError(f"data.shards={config.data.shards} holds no samples")
    measure = {"reconstruction": evaluate_reconstruction}[config.evaluate.kind]
    result = measure(config, images, ranks, world.device)
    if ranks.is_main:
        out = config.evaluate.out
        assert out is not None
        write_json(Path(out), result, indent=1)
        log.info("%s; all of it is in %s", _summary(result), out)
    close_world()


def _summary(result: dict[str, Any]) -> str:
    parts = []
    for name, value in result["metrics"].items():
        if isinstance(value, dict):
            parts.append(f"{name} ({value['name']}) {value['distance']:.4f}")
        elif value is not None:
            parts.append(f"{name} {value:.4f}")
    protocol = result["protocol"]
    return f"{protocol['images']} images at {protocol['image_size']} px: {', '.join(parts)}"


def evaluate_reconstruction(
    config: EvaluateJob, images: ImageSet, ranks: Ranks, device: torch.device
) -> dict[str, Any]:
    chosen = config.evaluate
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[chosen.precision]
    parts = load(chosen.model, chosen.ema)
    if parts.autoencoder is None:
        raise ConfigError(f"evaluate.model={chosen.model} has no autoencoder: give an autoencoder's run")
    _check_size(config, parts.autoencoder.downsampling)
    identity = digest(parts.autoencoder)
    autoencoder = parts.autoencoder.to(device, dtype)
    distance = open_distance(
        chosen.perceptual,
        chosen.perceptual_weights,
        chosen.perceptual_weights_sha256,
        chosen.perceptual_heads,
        chosen.perceptual_min_side,
        device,
        key="evaluate.perceptual",
    )
    extractor = open_features(
        chosen.features,
        chosen.features_weights,
        chosen.features_weights_sha256,
        device,
        key="evaluate.features",
    )
    scores = ReconstructionScores(distance)
    real = made = None
    if extractor is not None:
        real, made = FeatureSums(extractor.width, device), FeatureSums(extractor.width, device)
    for batch in images.batches(chosen.rank_batch, ranks):
        if not batch.counts:
            continue  # every rank holds the whole model: nobody waits
        pixels = batch.images.to(device).float() / 127.5 - 1
        with torch.no_grad():
            reconstructed = autoencoder(pixels.to(dtype), None)[0].float().clamp(-1, 1)
            scores.add(batch.numbers, pixels, reconstructed)
            if extractor is not None and real is not None and made is not None:
                real.add(extractor(pixels))
                made.add(extractor(reconstructed))
    means = scores.means()
    count, names, faults = images.identity()
    needed = 1 if extractor is None else 2
    if count < needed:
        use = (
            "a measurement needs one"
            if extractor is None
            else f"{extractor.distance} needs two, for a covariance"
        )
        raise DataError(
            f"data.shards={config.data.shards}: {count} images could be used"
            + (f" ({len(faults)} could not be read; the first: {faults[0]})" if faults else "")
            + f", and {use}: give more, or a larger evaluate.samples"
            + ("" if extractor is None else ", or evaluate.features=none"),
            shared=True,
        )
    metrics: dict[str, Any] = {"psnr_db": means.get("psnr_db"), "ssim": means["ssim"]}
    if distance is not None:
        metrics["perceptual"] = {"name": chosen.perceptual, "distance": means["perceptual"]}
    if extractor is not None and real is not None and made is not None:
        found = frechet_distance(real.gaussian(), made.gaussian())
        name = extractor.distance
        metrics[name] = found
        if count <= extractor.width:
            log.warning(
                "%s of %d images: fewer than its %d features, so it depends on the number of images",
                name,
                count,
                extractor.width,
            )
    return {
        "metrics": metrics,
        "protocol": {
            "kind": "reconstruction",
            "latent": "mean of the posterior" if isinstance(autoencoder, KLAutoencoder) else "nearest codes",
            "model": {
                "path": str(chosen.model),
                "autoencoder": identity,
                # What was measured, not what was asked for: a run may have kept no average.
                "ema": parts.autoencoder_average is not None,
                "average": parts.autoencoder_average,
            },
            "precision": chosen.precision,
            "arithmetic": arithmetic(),
            "batch": chosen.rank_batch,
            "images": count,
            "exact_images": int(means.get("exact_images", 0)),  # left out of psnr_db
            "sample_names_sha256": names,
            "unreadable": faults,
            "shards": list(images.index.shards),
            "trained_on": _trained_on(chosen.model, images.index.shards),
            "image_size": config.data.image_size,
            **({} if config.data.bucket_step is None else {"shapes": images.shapes}),
            "resize": "short side, antialiased bicubic (Pillow's filter, by torch), of the crop as it lies in the source",
            "decoder": config.data.decoder,
            "crop": "center",
            "transparency": "over white",
            "rounding": "8 bits for PSNR and SSIM",
            "ssim": "11x11 Gaussian of sigma 1.5, K1 0.01, K2 0.03, each colour by itself, valid places",
            "perceptual": _describe_weights(chosen.perceptual, None if distance is None else distance.sha256)
            | ({"min_side": chosen.perceptual_min_side} if chosen.perceptual == "efficientnet_lite0" else {}),
            "features": _describe_weights(chosen.features, None if extractor is None else extractor.sha256)
            | ({} if extractor is None else {"input": extractor.preparation, "width": extractor.width}),
            "versions": _versions(),
        },
        "ranks": ranks.size,
    }


def _check_size(config: EvaluateJob, factor: int) -> None:
    size = config.data.image_size
    if size is not None and size % factor:
        raise ConfigError(f"data.image_size={size} is no multiple of the autoencoder's factor {factor}")
    step = config.data.bucket_step
    if step is not None and step % factor:
        raise ConfigError(f"data.bucket_step={step} is no multiple of the autoencoder's factor {factor}")


def _trained_on(model: str, shards: Sequence[str]) -> list[str] | None:
    """Which of the shards the model was trained on; None where it does not say. More than none makes the figures flatter."""
    for folder in (Path(model), Path(model).parent.parent):
        if not RunFolder(folder).config_file.exists():
            continue
        data = RunFolder(folder).config().get("data", {})
        try:
            sets = [data["shards"]] if isinstance(data["shards"], str) else data["shards"]
            patterns = [entry["shards"] if isinstance(entry, dict) else entry for entry in sets]
            known = {shard for pattern in patterns for shard in expand(pattern, allow_pipe=True)}
        except (DataError, KeyError):
            return None
        common = sorted(known & set(shards))
        if common:
            log.warning("%d of %d shards were trained on: these figures flatter", len(common), len(shards))
        return common
    return None


def _describe_weights(name: str, sha256: str | None) -> dict[str, Any]:
    return {"name": name} if sha256 is None else {"name": name, "weights_sha256": sha256}


def _versions() -> dict[str, str]:
    return {"ldmscale": __version__, "torch": str(torch.__version__), "pillow": PIL.__version__}
