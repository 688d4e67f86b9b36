"""`ldmscale submit JOB cluster=NAME [cluster.KEY=VALUE ...] [--dry-run] [overrides of JOB ...]`.

`submit pipeline` queues the three stages as a chain; see `cluster/chain.py` for its words.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ldmscale.cluster.settings import configuration, usage
from ldmscale.cluster.submit import submit
from ldmscale.config.flags import parse
from ldmscale.config.folders import SEARCH_PATH
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import ConfigError

DRY_RUN = "--dry-run"


def main(arguments: Sequence[str]) -> int:
    """Submit as asked; see `cli` for the exit status."""
    from ldmscale.tracking.logs import set_up_logging

    set_up_logging(None, Ranks())
    line = parse("submit", arguments, own=(DRY_RUN,))
    search = [word for word in line.overrides if word.startswith(f"{SEARCH_PATH}=")]
    job, *overrides = [word for word in line.overrides if word not in search] or [""]
    if any(flag in ("-h", "--help") for flag in line.flags) or not arguments:
        sys.stdout.write(usage([*search, *overrides], job) + "\n")
        return 0 if arguments else 2
    if other := [flag for flag in line.flags if flag not in (DRY_RUN, "--cfg", "-c", "job", "--resolve")]:
        raise ConfigError(
            f"submit {' '.join(other)}: submit takes --cfg job, --help, --config-dir and {DRY_RUN}"
        )
    if any(flag in ("--cfg", "-c") for flag in line.flags):
        sys.stdout.write(configuration(job, [*search, *overrides]))
        return 0
    if not job or "=" in job:
        raise ConfigError(f"submit {job}: the job is missing; write ldmscale submit JOB cluster=NAME ...")
    submit(job, [*search, *overrides], dry_run=DRY_RUN in line.flags)
    return 0
