"""What the doctor measures before a run."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from ldmscale.config.data import StorageConfig
from ldmscale.config.values import STRICT, Positive


@dataclass(frozen=True, config=STRICT)
class DoctorConfig:
    """How closely the doctor looks. Before a run: at this machine or allocation; with run.dir: at a run."""

    folder: str = "runs"  # where runs will be written: its disk is measured
    shards: str | tuple[str, ...] | None = None  # shards that must be reachable
    storage: StorageConfig = field(default_factory=StorageConfig)  # how, as data.storage of the run
    experiment: str | None = None  # whose checkpoints must have room: conf/experiment/<experiment>.yaml
    keep_checkpoints: Positive = 2
    probe_shards: Positive = 8  # of all shards, evenly chosen, are opened
    measure_mib: Positive = 64  # written, read, and summed over the ranks
    # a rank that is slower than this share of the median is called slow
    slow_share: Annotated[float, Field(gt=0, lt=1)] = 0.8
