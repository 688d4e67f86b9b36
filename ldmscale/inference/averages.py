"""Which of a run's averaged weights to take, among them averages of a width that was not tracked (Karras et al. 2024).

A run with ema.power_widths=[0.05,0.1] and ema.store_every_steps stores both averages in its folder averages/. Any other
width is then the combination of these stored ones whose profile is nearest to the wanted one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ldmscale.checkpoint.folders import complete_checkpoints
from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.checkpoint.shards import Reader
from ldmscale.errors import CheckpointError, ConfigError
from ldmscale.train.engine.ema import MAIN, WIDEST, Profile, coefficients

log = logging.getLogger(__name__)

FAR = 0.05  # of the wanted profile's norm: what is farther from it is warned of
_POWER = re.compile(r"power_(\d*\.?\d+)")


def chosen_weights(reader: Reader, network: str, ema: bool | str) -> dict[str, Tensor]:
    """Whole weights of a network in a checkpoint, float32 by name, with its frozen weights and buffers.

    Args:
        ema: True takes the run's main average, or the raw weights of a run without any; False the raw weights. A
            string names another average: "ema_0.999" of ema.decays, or "power_0.08" of any width, made from the
            stored ones where it was not tracked itself.

    Raises:
        ConfigError: there is no such average. CheckpointError: it cannot be made, for want of stored ones.
    """
    kinds = reader.kinds(network)
    if isinstance(ema, bool):
        return reader.weights(network, kind=average_taken(reader, network, ema) or "master")
    if ema in kinds:
        return reader.weights(network, kind=ema)
    wanted = _POWER.fullmatch(ema)
    if wanted is None or not 0 < float(wanted[1]) <= WIDEST:
        kept = ", ".join(kind for kind in kinds if kind.startswith(("ema", "power_")))
        raise ConfigError(
            f"{reader.folder} has no average {ema!r} of {network}, only {kept or 'none'}; "
            f"power_WIDTH makes one of any width up to {WIDEST:.3f} from stored power-function averages"
        )
    return reconstructed(reader, network, float(wanted[1]))


def average_taken(reader: Reader, network: str, ema: bool | str) -> str | None:
    """The average whose weights `chosen_weights` gives; None: they are the raw ones."""
    if isinstance(ema, bool):
        return MAIN if ema and MAIN in reader.kinds(network) else None
    return ema


def reconstructed(reader: Reader, network: str, width: float) -> dict[str, Tensor]:
    """The power-function average of relative width `width` as it would stand in the checkpoint, by least squares.

    Frozen weights and buffers are the checkpoint's. The stored averages of the checkpoint's run up to its step are
    used, and those in the checkpoint itself. Raises CheckpointError where there are none.
    """
    updates = int(reader.state["networks"][network]["updates"])
    sources = [reader, *_stored(reader)]
    tracked = [found for source in sources for found in _tracked(source, network) if found[2].updates]
    # The checkpoint and the stored state of the same step hold the same average: one of them is enough.
    usable = list({found[2]: found for found in tracked if found[2].updates <= updates}.values())
    if not usable:
        raise CheckpointError(
            f"{reader.folder} has no power-function averages of {network}, from which one of width {width} could be "
            "made: train with ema.power_widths=[0.05,0.1] and ema.store_every_steps=..."
        )
    solved, distance = coefficients([profile for _, _, profile in usable], Profile(width, updates))
    said = log.warning if distance > FAR else log.info
    said(
        "power-function average of width %g from %d stored ones: its profile is off by %.2g of its norm%s",
        width,
        len(usable),
        distance,
        "; store averages more often" if distance > FAR else "",
    )
    weights = reader.weights(network)
    names = reader.names(network, "master")
    sums = {name: torch.zeros(weights[name].shape, dtype=torch.float64) for name in names}
    for share, (source, kind, _) in zip(solved, usable, strict=True):
        for name in names:
            sums[name].add_(source.tensor(f"{network}/{kind}/{name}").double(), alpha=float(share))
    return weights | {name: total.float() for name, total in sums.items()}


def _tracked(source: Reader, network: str) -> list[tuple[Reader, str, Profile]]:
    described = source.state["networks"].get(network, {}).get("averages", {})
    return [
        (source, kind, Profile(float(found["width"]), int(found["updates"])))
        for kind, found in described.items()
        if "width" in found
    ]


def _stored(reader: Reader) -> Sequence[Reader]:
    """The averages stored by the checkpoint's run up to its step."""
    folder = RunFolder(reader.folder.parent.parent).averages
    readers = [Reader(found) for found in complete_checkpoints(folder)]
    return [found for found in readers if found.manifest.step <= reader.manifest.step]
