"""The facts of a Slurm cluster, and how one submission uses it."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from ldmscale.config.schema import STRICT, NotNegative, Positive
from ldmscale.config.schema.data import StorageConfig


@dataclass(frozen=True, config=STRICT)
class ClusterConfig:
    """What sbatch is asked for, and what the job does before its ranks start."""

    nodes: Positive
    tasks_per_node: Positive  # ranks of a node: one a GPU, or any number without GPUs
    gpus_per_node: int | str = 0  # a number, or with their type as in "a100:4"
    cpus_per_task: Positive = 1
    # With fewer nodes than `nodes` the job may start too, down to this many: it resumes at any number of ranks.
    min_nodes: Positive | None = None
    time: Annotated[str, BeforeValidator(str)] = (
        "24:00:00"  # sbatch's notation, in quotes in a file; after it the job saves and queues itself again
    )
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    memory_per_node: str | None = None  # sbatch's notation, such as 900G
    exclude: tuple[str, ...] = ()  # nodes never used; those found bad are added at each requeue
    # Before the time limit, for the last save; Slurm looks every 30 s or so, thus a save's time and 60 more.
    stop_before_end_seconds: Annotated[int, Field(ge=30)] = 300
    requeue: bool = (
        True  # false where the site forbids `scontrol requeue`: `links` jobs follow each other then
    )
    links: Positive = 8  # with requeue=false: jobs of one name, each begins when the one before has ended
    max_requeues: NotNegative = 100
    # Attempts that failed one after the other without a newer checkpoint; then the job gives up.
    max_failures_without_progress: NotNegative = 2
    array: Positive | None = None  # latents only: so many independent jobs that share the shards out
    # Shell lines of the job's first node before the ranks start, such as "module load cuda/12.8"; a line that fails ends the job
    setup: tuple[str, ...] = ()
    node_setup: tuple[str, ...] = ()  # shell lines run once on each node before its ranks start
    # Variables of all ranks; $NAME and ${NAME} in a value are expanded where the job starts, and $$ is a dollar
    environment: dict[str, str] = Field(default_factory=dict)
    # Interpreter on the nodes: a path, or a list of words such as [apptainer, exec, --nv, image.sif, python]; the one that
    # submits where it is not given
    python: str | tuple[str, ...] | None = None
    options: tuple[str, ...] = ()  # further options of sbatch, such as "--reservation=ldm"
    srun_options: tuple[
        str, ...
    ] = ()  # options of the srun that starts the ranks, such as "--cpu-bind=cores"

    @property
    def gpus(self) -> int:
        """GPUs of a node, whatever their type; 0 where `gpus_per_node` is none of its forms."""
        number = str(self.gpus_per_node).rpartition(":")[2]
        return int(number) if number.isdecimal() else 0

    @property
    def python_words(self) -> tuple[str, ...] | None:
        """`python` as words of a command."""
        return (self.python,) if isinstance(self.python, str) else self.python

    @property
    def world_sizes(self) -> list[int]:
        """Every number of ranks that the job may start with."""
        fewest = self.min_nodes or self.nodes
        return [nodes * self.tasks_per_node for nodes in range(fewest, self.nodes + 1)]


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
