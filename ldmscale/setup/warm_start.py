"""Where the weights come from that a new run begins with: another run, one of its checkpoints, or a foreign model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from ldmscale.checkpoint.manager import newest_checkpoint
from ldmscale.checkpoint.run_folder import RunFolder, is_foreign
from ldmscale.checkpoint.shards import Reader
from ldmscale.config.schema.training import WarmStartConfig
from ldmscale.errors import CheckpointError
from ldmscale.inference.load import load
from ldmscale.train.engine.ema import MAIN
from ldmscale.train.stage import Stage
from ldmscale.train.warm_start import SavedWeights, Weights, WholeWeights, warm_start

log = logging.getLogger(__name__)


def begin_with(config: WarmStartConfig, stage: Stage) -> None:
    """Give the networks of a new run the weights that `warm_start.path` has, and start their averages from them.

    A network that is not there keeps its own beginning, which is told; the first one must be there.
    Raises CheckpointError where there is none, or where one does not fit.
    """
    if config.path is None:
        return
    path = Path(config.path)
    for number, (name, engine) in enumerate(stage.engines.items()):
        weights = (
            _foreign(path, name, config.weights) if is_foreign(path) else _saved(path, name, config.weights)
        )
        if weights is None and number == 0:
            raise CheckpointError(
                f"warm_start.path={path} has no network {name!r}: give a model of this job's kind"
            )
        if weights is None:
            log.warning("%s has no network %r: it begins as without warm_start", path, name)
            continue
        warm_start(engine, weights, str(path))
        for average in stage.averages.get(name, ()):
            average.reset()
        log.info("%s begins with the weights of %s", name, path)


def _foreign(path: Path, network: str, which: Literal["ema", "raw"]) -> Weights | None:
    parts = load(path, ema=which == "ema")
    module = {"denoiser": parts.denoiser, "generator": parts.autoencoder}.get(network)
    return None if module is None else WholeWeights(module.state_dict())


def _saved(path: Path, network: str, which: Literal["ema", "raw"]) -> Weights | None:
    checkpoint: Path | None = path
    if not path.name.startswith("step_"):
        checkpoint = newest_checkpoint(RunFolder(path).checkpoints)
    if checkpoint is None:
        raise CheckpointError(
            f"warm_start.path={path} has no complete checkpoint: give a run that has saved one"
        )
    reader = Reader(checkpoint)
    if network not in reader.networks():
        return None
    kind = MAIN if which == "ema" and MAIN in reader.kinds(network) else "master"
    if which == "ema" and kind != MAIN:
        log.info("%s keeps no average of %s: its raw weights are taken", checkpoint, network)
    return SavedWeights(reader, network, kind)
