"""A rank whose launcher died ends itself: first in good order, and by force if that takes too long.

The kernel tells a rank of its launcher's death by SIGTERM, which asks for a stop. A rank that is stuck in a
collective with a dead peer never comes to the boundary where stops are agreed on. Imports no torch.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

log = logging.getLogger(__name__)

LAUNCHER = "LDMSCALE_LAUNCHER_PID"  # set by our launcher for its ranks
GRACE = "LDMSCALE_ORPHAN_SECONDS"  # how long an orphan may take to save and end
_DEFAULT_GRACE_SECONDS = 300.0
_POLL_SECONDS = 1.0


def watch_launcher(on_death: Callable[[], None], env: Mapping[str, str] = os.environ) -> None:
    """Call `on_death` from a thread once the launcher of this rank is gone, and end the process later.

    Does nothing in a process that our launcher did not start.
    """
    launcher = env.get(LAUNCHER, "")
    if launcher.isdigit() and os.getppid() == int(launcher):
        grace = float(env.get(GRACE, _DEFAULT_GRACE_SECONDS))
        watch = threading.Thread(target=_watch, args=(int(launcher), on_death, grace), daemon=True)
        watch.start()


def _watch(launcher: int, on_death: Callable[[], None], grace: float) -> None:
    while os.getppid() == launcher:
        time.sleep(_POLL_SECONDS)
    on_death()
    time.sleep(grace)
    log.critical(
        "the launcher died %.0f s ago, and this rank could not stop in good order: it ends now", grace
    )
    os._exit(1)


PARTED = "LDMSCALE_PARTED"  # a folder; set by our launcher for ranks that will part


def part(rank: int, env: Mapping[str, str] = os.environ) -> None:
    """Tell the launcher, if it is ours, that this rank waits for no other from now on."""
    if folder := env.get(PARTED):
        (Path(folder) / str(rank)).touch()


def have_parted(folder: Path, ranks: Iterable[int]) -> bool:
    """Whether all these ranks have."""
    return all((folder / str(rank)).exists() for rank in ranks)
