"""Checks jobs on the login node, freezes them in their run folders, and queues them with Slurm.

Each job is checked for every number of ranks that it may start with; then the resolved configuration, the code and the job
script are frozen in the run folder, and Slurm gets the script.
"""

from __future__ import annotations

import logging
import os
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
from ldmscale.config.checks.cluster import check_cluster, check_script_paths
from ldmscale.config.compose import compose_job, compose_valid
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
    submitted: list[str] = []
    try:
        for plan in planned:
            after = submitted[-1] if submitted else None
            number = _submit(plan, after, dry=dry_run)
            if number is not None:
                submitted.append(number)
    except (ConfigError, KeyboardInterrupt):
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
    cluster, faults = _cluster(of_cluster)
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
    # The job reads its configuration from a file, and files hold no secrets.
    if config is not None:
        where = ", export it where the job runs (sbatch passes yours on)"
        faults += secret_faults(plain(config), "a submission", hint=where)
    if faults or cluster is None or config is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    owner = _owner(config)
    if isinstance(config, (AutoencoderJob, DiffusionJob)):
        changes(RunFolder(owner), plain(config))
    return Planned(stage.job, config, cluster, owner, ["ldmscale", stage.job, *of_job])


def _paths(job: str, overrides: Sequence[str], cluster: ClusterConfig | None) -> dict[str, str]:
    """What the job script and Slurm's options name, by its setting; also where other settings are faulty."""
    values, _ = compose_valid(job, overrides)
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
        number = record.get("slurm_job")
        known = has_form(str(number), SLURM_JOB)  # anything else would be an option or a user of squeue
        state = queue.unfinished(str(number), submission.script) if known else None
        if state is not None:
            raise ConfigError(
                f"{owner} is submitted already, as Slurm job {number} ({state.lower()}): wait for it, "
                f"`scancel {number}`, or give another run.name"
            )


def _submit(plan: Planned, after: str | None, *, dry: bool) -> str | None:
    folder = frozen.freeze(plan.owner, plan.job, plain(plan.config), plan.command)
    logs = plan.owner / "logs"
    logs.mkdir(exist_ok=True)
    name = f"{plan.owner.name}-{plan.job}" if plan.job not in plan.owner.name else plan.owner.name
    folder.script.write_text(render(folder, plan.job, name, logs, Path.cwd(), plan.cluster))
    if dry:
        log.info("%s", folder.script.read_text())
        log.info("nothing was queued; `sbatch %s` would", folder.script)
        return None
    number = queue.sbatch(folder.script, after)
    frozen.note(folder, {"slurm_job": number, "after": after})
    output = logs / (f"slurm_{number}_*.out" if plan.cluster.array else f"slurm_{number}.out")
    log.info(
        "%s is Slurm job %s%s; its output: %s", plan.job, number, f", after {after}" if after else "", output
    )
    return number


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")
