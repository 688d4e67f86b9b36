"""`ldmscale wandb-sync run.dir=DIR`: send a run to W&B as metrics.jsonl tells it, each step once, with its pictures.

For runs that trained where no network was, and for those whose W&B run lost something. It makes a new W&B run; what nodes
left in DIR/wandb can also be uploaded as it is, by `wandb sync DIR/wandb/offline-run-*`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldmscale.config import WandbSyncJob
from ldmscale.config.load import configured
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import DataError
from ldmscale.storage.given_files import lines_of, read_given_text
from ldmscale.storage.plain_values import Count, checked, parsed_object

log = logging.getLogger(__name__)

_PICTURE = re.compile(r"(?:(?P<name>.+)_)?step_(?P<step>\d{8})\.png")


def main(overrides: Sequence[str]) -> int:
    """Send the run; see `cli` for the exit status."""
    config, _ = configured(WandbSyncJob, overrides)
    import numpy as np
    from PIL import Image

    from ldmscale.checkpoint.run_folder import RunFolder
    from ldmscale.tracking.logs import set_up_logging
    from ldmscale.tracking.wandb_run import start_wandb

    set_up_logging(None, Ranks())
    folder = RunFolder(config.run.dir)
    lines = list(_lines(folder.path / "metrics.jsonl"))
    tracking = config.tracking
    run = start_wandb(
        folder.path,
        tracking.wandb,
        run_id=config.run_id,
        name=folder.path.resolve().name,
        project=tracking.project,
        entity=tracking.entity,
        tags=tracking.tags,
        config=folder.config(),
        images_per_hour=len(lines) + 10**6,
    )
    if run is None:
        return 1
    pictures = sorted(folder.samples.glob("*.png"), key=lambda path: path.name[-12:])
    for line in lines:
        step = int(line.pop("step"))
        run.log(step, {key: float(value) for key, value in line.items()})
    sent = 0
    for path in pictures:
        if found := _PICTURE.fullmatch(path.name):
            try:
                picture = np.asarray(Image.open(path).convert("RGB"))
            except (OSError, ValueError, SyntaxError) as error:  # Pillow's, of a file that is cut
                log.warning("%s is not sent: it is no image that can be read (%s)", path, error)
                continue
            sent += 1
            run.log_image(int(found["step"]), found["name"] or "samples", picture)
    run.close("finished")
    log.info("sent %d lines of metrics and %d pictures, %s", len(lines), sent, run.mode)
    return 0


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines_of(read_given_text(path, "give another run.dir")), start=1):
        try:
            values = parsed_object(line)
            checked(dict[str, float], values)
            checked(Count, values.get("step"))
        except ValueError:
            raise DataError(
                f"{path}, line {number} is no line of metrics: {line[:80]!r}; remove it"
            ) from None
        yield values
