"""A submission, frozen: the resolved configuration, the code, and the job script, in one numbered folder.

A job may wait for days and come back for weeks; the checkout that it was submitted from may change meanwhile. So the
job reads nothing but this folder, the interpreter and its packages, whose versions are written down.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldmscale import redact
from ldmscale.checkpoint.run_folder import REVISION, git_revision
from ldmscale.config.folders import config_folder
from ldmscale.errors import ConfigError
from ldmscale.storage.atomic import write_json
from ldmscale.storage.digest import folder_sha256
from ldmscale.storage.plain_values import parsed_object

SUBMISSIONS = "submissions"
_START = '''"""Starts the frozen code, wherever the job stands: this file's folder comes first in the search for modules."""

import sys

from ldmscale.cli import main

sys.exit(main())
'''
_RECORDED = ("torch", "deepspeed", "webdataset", "hydra-core", "wandb", "xformers", "transformers", "fsspec")


@dataclass(frozen=True)
class Frozen:
    """Where one submission lies."""

    folder: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"

    @property
    def code(self) -> Path:
        """The package and its conf/, with start.py."""
        return self.folder / "code"

    @property
    def script(self) -> Path:
        """What sbatch gets."""
        return self.folder / "job.sbatch"

    @property
    def record(self) -> Path:
        """What was submitted, by whom, from where, with which versions, as which job."""
        return self.folder / "submission.json"


def freeze(owner: Path, job: str, config: Mapping[str, Any], command: Sequence[str]) -> Frozen:
    """Write the next submission of `owner`, a run folder or the like; its script is still to be rendered."""
    submissions = owner / SUBMISSIONS
    try:
        submissions.mkdir(parents=True, exist_ok=True)
        frozen = Frozen(_next_folder(submissions))
    except OSError as error:
        raise ConfigError(f"{submissions} cannot be made ({error.strerror}): give another run.dir") from None
    frozen.config.write_text(yaml.safe_dump(redact.config(config), sort_keys=False, allow_unicode=True))
    package = Path(__file__).resolve().parents[1]
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(package, frozen.code / "ldmscale", ignore=ignore)
    if not (frozen.code / "ldmscale" / "conf").is_dir():  # a checkout has it beside the package
        shutil.copytree(config_folder(), frozen.code / "conf", ignore=ignore)
    (frozen.code / "start.py").write_text(_START)
    # The manifests of its checkpoints shall say it, though no checkout is there any more.
    revision = git_revision()
    (frozen.code / "ldmscale" / REVISION).write_text(f"{revision or ''}\n")
    write_json(
        frozen.record,
        {
            "job": job,
            "command": [redact.text(word) for word in command],
            "directory": os.getcwd(),
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "code_sha256": folder_sha256(frozen.code),
            "git_revision": revision,
            "python": sys.version.split()[0],
            "packages": _versions(),
        },
    )
    return frozen


def note(frozen: Frozen, values: Mapping[str, Any]) -> None:
    """Add `values` to the record of the submission."""
    write_json(frozen.record, {**read_record(frozen.record), **values})


def earlier(owner: Path) -> list[tuple[Frozen, dict[str, Any]]]:
    """The submissions of `owner` with their records, oldest first."""
    files = sorted((owner / SUBMISSIONS).glob("[0-9]*/submission.json"))
    return [(Frozen(file.parent), read_record(file)) for file in files]


def read_record(file: Path) -> dict[str, Any]:
    """A submission.json. Raises ConfigError where it is damaged."""
    try:
        return parsed_object(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} is damaged ({error}): move the folder of that submission away, once its job has ended"
        ) from error


def _next_folder(submissions: Path) -> Path:
    number = max((int(p.name) for p in submissions.glob("[0-9]*") if p.name.isdigit()), default=0)
    while True:
        number += 1
        folder = submissions / f"{number:04d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue  # somebody else submits at this moment
        return folder


def _versions() -> dict[str, str]:
    versions = {}
    for name in _RECORDED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
