"""`ldmscale evaluate`: measure a model on images that it was not trained on. One JSON holds the figures and every choice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmscale.config import EvaluateJob
from ldmscale.config.load import configured
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import DataError
from ldmscale.storage.atomic import write_json

log = logging.getLogger(__name__)


def main(overrides: Sequence[str]) -> int:
    """Measure as configured; see `cli` for the exit status."""
    config, ranks = configured(EvaluateJob, overrides)
    return _run(config, ranks)


def _run(config: EvaluateJob, ranks: Ranks) -> int:
    from ldmscale.distributed.process_group import close_world, open_world
    from ldmscale.evaluation.held_out import ImageSet
    from ldmscale.setup.evaluation import evaluate_reconstruction
    from ldmscale.setup.index import open_index
    from ldmscale.tracking.logs import set_up_logging

    world = open_world(ranks)
    set_up_logging(None, ranks)
    index = open_index(config.data.shards, config.data, ranks)
    images = ImageSet(index, config.data, min(config.evaluate.samples or index.total, index.total))
    if images.count < 1:
        raise DataError(f"data.shards={config.data.shards} holds no samples")
    measure = {"reconstruction": evaluate_reconstruction}[config.evaluate.kind]
    result = measure(config, images, ranks, world.device)
    if ranks.is_main:
        chosen = config.evaluate
        out = chosen.out or str(Path(chosen.model) / "evaluation" / f"{chosen.kind}.json")
        write_json(Path(out), result, indent=1)
        log.info("%s; all of it is in %s", _said(result), out)
    close_world()
    return 0


def _said(result: dict[str, Any]) -> str:
    parts = []
    for name, value in result["metrics"].items():
        if isinstance(value, dict):
            parts.append(f"{name} ({value['name']}) {value['distance']:.4f}")
        else:
            parts.append(f"{name} {value:.4f}")
    return f"{result['protocol']['images']} images: {', '.join(parts)}"
