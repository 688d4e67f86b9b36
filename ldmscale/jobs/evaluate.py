"""`ldmscale evaluate`: measure a model on images that it was not trained on. One JSON file holds the metrics and the protocol."""

from __future__ import annotations

from collections.abc import Sequence

from ldmscale.config import EvaluateJob
from ldmscale.config.load import configured


def main(overrides: Sequence[str]) -> int:
    """Measure as configured; see `cli` for the exit status."""
    config, ranks = configured(EvaluateJob, overrides)
    from ldmscale.setup.evaluation import evaluate

    evaluate(config, ranks)
    return 0
