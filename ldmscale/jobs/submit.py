"""`ldmscale submit JOB cluster=NAME [cluster.KEY=VALUE ...] [--dry-run] [overrides of JOB ...]`.

`submit pipeline` queues the three stages as a chain; see `cluster/chain.py` for its words.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ldmscale.cluster.submit import submit
from ldmscale.distributed.environment import Ranks

log = logging.getLogger(__name__)

DRY_RUN = "--dry-run"
USAGE = """usage: ldmscale submit JOB cluster=NAME [cluster.nodes=N ...] [--dry-run] [overrides of JOB ...]
       ldmscale submit pipeline cluster=NAME run.name=NAME data.shards=... [STAGE:override ...]

cluster=NAME is conf/cluster/NAME.yaml. --dry-run freezes the run folder and shows the script, but queues nothing.
STAGE is autoencoder, latents or diffusion; overrides without it go to every stage that knows them."""


def main(arguments: Sequence[str]) -> int:
    """Submit as asked; see `cli` for the exit status."""
    from ldmscale.tracking.logs import set_up_logging

    set_up_logging(None, Ranks())
    words = [word for word in arguments if word != DRY_RUN]
    if not words or words[0] in ("-h", "--help"):
        log.info("%s", USAGE)
        return 0 if words else 2
    job, *overrides = words
    submit(job, overrides, dry_run=DRY_RUN in arguments)
    return 0
