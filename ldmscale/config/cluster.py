"""The facts of a Slurm cluster, and how one submission uses it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from ldmscale.config.values import STRICT, NotNegative, Positive


@dataclass(frozen=True, config=STRICT)
class ClusterConfig:
    """What sbatch is asked for, and what the job does before its ranks start."""

    nodes: Positive
    tasks_per_node: Positive  # ranks of a node: one a GPU, or any number without GPUs
    gpus_per_node: NotNegative = 0
    cpus_per_task: Positive = 1
    # With fewer nodes than `nodes` the job may start too, down to this many: it resumes at any number of ranks.
    min_nodes: Positive | None = None
    time: Annotated[str, BeforeValidator(str)] = (
        "24:00:00"  # sbatch's notation; after it the job saves and queues itself again
    )
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    memory_per_node: str | None = None  # sbatch's notation, such as 900G
    exclude: tuple[str, ...] = ()  # nodes never used; those found bad are added at each requeue
    # Before the time limit, for the last save; Slurm looks every 30 s or so, thus a save's time and 60 more.
    stop_before_end_seconds: Annotated[int, Field(ge=30)] = 300
    max_requeues: NotNegative = 100
    # Attempts that failed one after the other without a newer checkpoint; then the job gives up.
    max_failures_without_progress: NotNegative = 2
    array: Positive | None = None  # latents only: so many independent jobs that share the shards out
    setup: tuple[str, ...] = ()  # shell lines before the ranks start, such as "module load cuda/12.8"
    environment: dict[str, str] = Field(default_factory=dict)  # variables of all ranks
    python: str | None = None  # interpreter on the nodes; the one that submits unless given
    options: tuple[str, ...] = ()  # further options of sbatch, such as "--reservation=ldm"

    @property
    def world_sizes(self) -> list[int]:
        """Every number of ranks that the job may start with."""
        fewest = self.min_nodes or self.nodes
        return [nodes * self.tasks_per_node for nodes in range(fewest, self.nodes + 1)]
