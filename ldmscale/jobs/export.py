"""`ldmscale export`: a run, or an imported model, in the format of others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ldmscale.checkpoint.run_folder import is_foreign
from ldmscale.config import ExportJob
from ldmscale.config.load import configured

log = logging.getLogger(__name__)


def main(overrides: Sequence[str]) -> int:
    """Export as configured; see `cli` for the exit status."""
    config, ranks = configured(ExportJob, overrides)
    from ldmscale.inference.export_run import read_run
    from ldmscale.interop.reading import one_average, read
    from ldmscale.interop.writing import chosen, write
    from ldmscale.tracking.logs import set_up_logging

    set_up_logging(None, ranks)
    src, dst = Path(config.src), Path(config.dst)
    if is_foreign(src):
        ema = one_average(config.ema)
        model = read(src)
    else:
        ema, model = True, read_run(src, config.ema)
    if config.parts is not None:
        model = chosen(model, config.parts)
    write(model, dst, config.format, ema, config.overwrite)
    log.info("%s is in %s", ", ".join(model.parts), dst)
    return 0
