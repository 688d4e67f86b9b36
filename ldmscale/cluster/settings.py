"""What `ldmscale submit` shows: its usage with the settings of a cluster, and the configuration that it would submit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import yaml

from ldmscale import redact
from ldmscale.cluster.chain import stages_of
from ldmscale.config import JOBS, ClusterConfig
from ldmscale.config.compose import compose_job
from ldmscale.config.folders import SEARCH_PATH, config_folders, options
from ldmscale.config.typed import plain_part
from ldmscale.errors import ConfigError

USAGE = """usage: ldmscale submit JOB cluster=NAME [cluster.nodes=N ...] [--dry-run] [overrides of JOB ...]
       ldmscale submit pipeline cluster=NAME run.name=NAME data.shards=... [STAGE:override ...]

cluster=NAME is conf/cluster/NAME.yaml. --dry-run freezes the run folder and shows the script, but queues nothing.
STAGE is autoencoder, latents or diffusion; overrides without it go to every stage that knows them.
--config-dir DIR is searched, too: DIR/cluster/NAME.yaml, DIR/experiment/NAME.yaml. --cfg job shows the configuration."""


def usage(overrides: Sequence[str], job: str) -> str:
    """The usage of `submit`, the clusters that there are, and every setting of one with its default."""
    names = ", ".join(options("cluster", config_folders(overrides)))
    of_job = job if job in JOBS else "JOB"
    return (
        f"{USAGE}\n\nclusters: {names}\n\nsettings of a cluster, with their defaults (???: it must be given):\n\n"
        f"{_yaml({'cluster': _cluster({})})}\nSettings of the job: `ldmscale {of_job} --help`"
    )


def configuration(job: str, overrides: Sequence[str]) -> str:
    """What would be submitted, as YAML: the settings of the cluster and of the job, or of every stage of the pipeline.

    Raises ConfigError where an override cannot be applied.
    """
    if job == "pipeline":
        stages, faults = stages_of(overrides)
        if faults:
            raise ConfigError(faults)
        return _yaml({stage.job: _submitted(stage.job, stage.overrides) for stage in stages})
    if job and job not in JOBS:
        raise ConfigError(f"submit {job}: expected pipeline or one of {', '.join(JOBS)}")
    return _yaml(_submitted(job, overrides))


def _submitted(job: str, overrides: Sequence[str]) -> dict[str, Any]:
    own = [word for word in overrides if _key(word).split(".")[0] == "cluster"]
    search = [word for word in overrides if _key(word) == SEARCH_PATH]
    values: dict[str, Any] = {
        "cluster": _cluster(compose_job("submit", [*search, *own]).get("cluster") or {})
    }
    if job and job != "submit":
        values |= compose_job(job, [word for word in overrides if word not in own])
    return redact.config(values)


def _cluster(given: dict[str, Any]) -> dict[str, Any]:
    defaults = plain_part(ClusterConfig(nodes=1, tasks_per_node=1))
    defaults |= {
        field.name: "???"
        for field in fields(ClusterConfig)
        if field.default is field.default_factory is MISSING
    }
    return {**defaults, **given}


def _yaml(values: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    return text


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")
