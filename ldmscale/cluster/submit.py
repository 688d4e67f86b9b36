"""Checks jobs on the login node, freezes them in their run folders, and queues them with Slurm.

Each job is checked for every number of ranks that it may start with; then the resolved configuration, the code and the job
script are frozen in the run folder, and Slurm gets the script.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmscale.checkpoint.run_folder import RunFolder, latents_folder
from ldmscale.cluster import slurm as queue
from ldmscale.cluster import submission as frozen
from ldmscale.cluster.chain import Stage, stages_of
from ldmscale.cluster.slurm import render
from ldmscale.config import JOBS, AutoencoderJob, ClusterConfig, DiffusionJob, Job, LatentsJob, SubmitJob
from ldmscale.config.checks.cluster import check_cluster, check_script_paths, python_hint, time_as_text
from ldmscale.config.checks.stages import batch_of_all
from ldmscale.config.compose import compose_job, compose_valid
from ldmscale.config.folders import SEARCH_PATH
from ldmscale.config.load import resolved
from ldmscale.config.resume import changes
from ldmscale.config.secrets import secret_faults
from ldmscale.config.typed import plain, read
from ldmscale.distributed.environment import in_slurm_step
from ldmscale.errors import ConfigError
from ldmscale.storage.names import SLURM_JOB, has_form

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """One job, checked and ready to be frozen."""

    job: str
    config: Job
    cluster: ClusterConfig
    owner: Path  # the run folder, or the folder that receives latents or pictures
    command: list[str]
    name: str | None = None  # in the queue, where a chain gives it

    @property
    def queue_name(self) -> str:
        """The name that squeue shows."""
        own = self.owner.name
        name = self.name or (own if self.job in own else f"{own}-{self.job}")
        if self.cluster.requeue:
            return name
        # Slurm takes jobs of one name for one chain: those of another run with the same name must have another one.
        return f"{name}-{hashlib.sha256(os.fsencode(self.owner)).hexdigest()[:6]}"


def submit(job: str, overrides: Sequence[str], *, dry_run: bool) -> None:
    """Submit one job, or "pipeline" as a chain of its stages; with `dry_run` only freeze it and log the script."""
    if in_slurm_step():
        raise ConfigError("submit runs once, on a login node, and not as a task of a job: leave srun away")
    known = [name for name in JOBS if name not in ("submit", "quickstart", "plan", "report")]
    if job == "pipeline":
        stages, faults = stages_of(overrides)
    elif job in known:
        stages, faults = [Stage(job, list(overrides), ())], []
    else:
        raise ConfigError(f"submit {job}: expected pipeline or one of {', '.join(known)}")
    planned = _plan_all(stages, faults)
    for plan in planned:
        _refuse_second(plan.owner)
    folders = [_freeze(plan) for plan in planned]
    if dry_run:
        _show(planned, folders)
        return
    submitted: list[str] = []
    try:
        for plan, folder in zip(planned, folders, strict=True):
            _queue(plan, folder, submitted)
    except ConfigError:
        queue.cancel(submitted)  # a chain that is not whole is no chain
        raise


def _plan_all(stages: Sequence[Stage], faults: list[str]) -> list[Planned]:
    """Every stage resolved and checked; ConfigError with `faults` and those of all stages."""
    planned = []
    for stage in stages:
        try:
            planned.append(_plan(stage))
        except ConfigError as error:
            prefix = f"{stage.job}: " if len(stages) > 1 else ""
            faults += [prefix + fault for fault in error.faults]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return planned


def _plan(stage: Stage) -> Planned:
    of_cluster = [
        word for word in stage.overrides if _key(word) == "cluster" or _key(word).startswith("cluster.")
    ]
    of_job = [word for word in stage.overrides if word not in of_cluster]
    search = [word for word in of_job if _key(word) == SEARCH_PATH]
    cluster, faults = _cluster([*search, *of_cluster])
    faults += check_script_paths(_paths(stage.job, of_job, cluster))
    sizes = [1]
    if cluster is not None:
        sizes = cluster.world_sizes if cluster.array is None else [cluster.tasks_per_node * cluster.nodes]
        if cluster.array is not None and stage.job != "latents":
            faults.append(
                f"cluster.array={cluster.array}: only latents can be shared out between jobs that know nothing of each "
                "other; leave it away"
            )
    config: Job | None = None
    for size in sizes:
        try:
            config = resolved(JOBS[stage.job], of_job, size)
        except ConfigError as error:
            # What an earlier stage will have made cannot be there yet.
            faults += [f for f in error.faults if not any(str(path) in f for path in stage.awaited)]
            config = config or _unchecked(stage, of_job, error)
    if len(sizes) > 1:
        faults = _one_batch_fault(stage, of_job, sizes, faults)
    # The job reads its configuration from a file, and files hold no secrets.
    if config is not None:
        where = ", export it where the job runs (sbatch passes yours on)"
        faults += secret_faults(plain(config), "a submission", hint=where)
    if faults or cluster is None or config is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    owner = _owner(config)
    if isinstance(config, (AutoencoderJob, DiffusionJob)):
        changes(RunFolder(owner), plain(config))
    return Planned(stage.job, config, cluster, owner, ["ldmscale", stage.job, *of_job], stage.name)


def _one_batch_fault(
    stage: Stage, of_job: Sequence[str], sizes: Sequence[int], faults: list[str]
) -> list[str]:
    """`faults` with those of the global batch, one per number of ranks, replaced by one that suits all of them."""
    several = [fault for fault in faults if fault.startswith("train.global_batch=") and " ranks = " in fault]
    if not several:
        return faults
    whole = batch_of_all(compose_job(stage.job, of_job).get("train") or {}, sizes)
    return [*(fault for fault in faults if fault not in several), *([whole] if whole else several)]


def _paths(job: str, overrides: Sequence[str], cluster: ClusterConfig | None) -> dict[str, str]:
    """What the job script and Slurm's options name, by its setting; also where other settings are faulty."""
    try:
        values, _ = compose_valid(job, overrides)
    except ConfigError:
        values = {}  # reported with the job's own faults
    found = {"the working folder": os.getcwd()}
    if cluster is not None and cluster.python is None:
        found["the interpreter"] = sys.executable
    for key in ("run.name", "run.dir", "latents.path"):
        section, name = key.split(".")
        value = (values.get(section) or {}).get(name)
        if isinstance(value, str):
            found[key] = value
    return found


def _cluster(overrides: Sequence[str]) -> tuple[ClusterConfig | None, list[str]]:
    """The cluster and its faults; None where its values cannot even be read."""
    values, faults = compose_valid("submit", overrides)
    try:
        faults += time_as_text(values, any(_key(word) == "cluster.time" for word in overrides))
        cluster = read(SubmitJob, values).cluster
    except ConfigError as error:
        return None, [*faults, *error.faults]
    return cluster, [*faults, *check_cluster(cluster)]


def _unchecked(stage: Stage, overrides: Sequence[str], error: ConfigError) -> Job | None:
    """The configuration although checks found something, where that is nothing but what is awaited."""
    if not all(any(str(path) in fault for path in stage.awaited) for fault in error.faults):
        return None
    return read(JOBS[stage.job], compose_job(stage.job, overrides))


def _owner(config: Any) -> Path:
    """The folder beside whose results the submission is kept."""
    if getattr(config, "run", None) is not None and config.run.dir is not None:
        folder = Path(config.run.dir)
    elif isinstance(config, LatentsJob):
        folder = latents_folder(config.latents.path)
    else:
        folder = Path("runs") / config.job
    return folder.absolute()


def _refuse_second(owner: Path) -> None:
    """Two jobs of one run folder would only wait for each other, or fail."""
    for submission, record in frozen.earlier(owner):
        jobs = record.get("slurm_jobs") or [record.get("slurm_job")]
        # Anything that is no number would be an option or a user of squeue.
        known = [str(job) for job in jobs if has_form(str(job), SLURM_JOB)] if isinstance(jobs, list) else []
        states = {
            job: state for job in known if (state := queue.unfinished(job, submission.script)) is not None
        }
        for number, state in states.items():
            raise ConfigError(
                f"{owner} is submitted already, as Slurm job {number} ({state.lower()}): wait for it, "
                f"`scancel {' '.join(states)}`, or give another run.name"
            )


def _freeze(plan: Planned) -> frozen.Frozen:
    folder = frozen.freeze(plan.owner, plan.job, plain(plan.config), plan.command)
    logs = plan.owner / "logs"
    logs.mkdir(exist_ok=True)
    folder.script.write_text(render(folder, plan.job, plan.queue_name, logs, Path.cwd(), plan.cluster))
    if hint := python_hint(plan.cluster):
        log.warning("%s", hint)
    return folder


def _links(plan: Planned) -> int:
    return 1 if plan.cluster.requeue else plan.cluster.links


def _show(planned: Sequence[Planned], folders: Sequence[frozen.Frozen]) -> None:
    """Log the scripts, and the commands that would queue them."""
    for folder in folders:
        log.info("%s", folder.script.read_text())
    commands = []
    for number, (plan, folder) in enumerate(zip(planned, folders, strict=True)):
        after = f"${planned[number - 1].job}" if number else None
        words = ["sbatch", "--parsable", *queue.dependency(after, singleton=_links(plan) > 1)]
        command = f"{plan.job}=$({' '.join(words)} {shlex.quote(str(folder.script))})"
        commands.append(
            f"for link in {{1..{_links(plan)}}}; do {command}; done" if _links(plan) > 1 else command
        )
    if len(commands) == 1 and _links(planned[0]) == 1:
        log.info("nothing was queued; `sbatch %s` would", folders[0].script)
    else:
        log.info("nothing was queued; these commands would:\n%s", "\n".join(commands))


def _queue(plan: Planned, folder: frozen.Frozen, submitted: list[str]) -> None:
    """Queue one stage after what is `submitted`, and add its jobs there."""
    after = submitted[-1] if submitted else None
    links = _links(plan)
    numbers = []
    for _ in range(links):
        numbers.append(queue.sbatch(folder.script, after, singleton=links > 1))
        submitted.append(numbers[-1])
    frozen.note(folder, {"slurm_job": numbers[-1], "slurm_jobs": numbers, "after": after})
    logs = plan.owner / "logs"
    output = logs / (f"slurm_{numbers[0]}_*.out" if plan.cluster.array else f"slurm_{numbers[0]}.out")
    log.info(
        "%s is Slurm job %s%s; its output: %s",
        plan.job,
        numbers[0] if links == 1 else f"{numbers[0]} to {numbers[-1]}, one after the other",
        f", after {after}" if after else "",
        output,
    )


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")
