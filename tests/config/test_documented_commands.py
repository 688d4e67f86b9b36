"""Every command that the documentation and the files of conf/ show is one: its keys and groups exist, its grammar is read."""

import re
import shlex
from pathlib import Path

import pytest

from ldmscale.cluster.chain import stages_of
from ldmscale.config import JOBS
from ldmscale.config.compose import compose_valid
from ldmscale.config.folders import config_folder

CHECKOUT = Path(__file__).resolve().parents[2]
FILES = [CHECKOUT / "README.md", CHECKOUT / "slurm" / "README.md", *sorted((CHECKOUT / "docs").glob("*.md")),
         *sorted(config_folder().rglob("*.yaml"))]  # fmt: skip
COMMAND = re.compile(
    r"^(?:#|    )?\s*(?:\.venv/bin/)?(?:ldmscale|launch/local\.sh(?: -n \d+)?(?: --cpu)?) +([a-z-]+ .*)$"
)
FLAGS = ("--dry-run",)


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """(job, overrides) of each line that is a command; `...`, the brackets of what may be left away, and comments, are none."""
    text = re.sub(r"\\\n[# ]*", "", path.read_text())
    found = []
    for line in text.splitlines():
        if not (match := COMMAND.match(line)):
            continue
        job, *words = shlex.split(re.sub(r"  +\S.*$| \[.*$", "", match[1]), comments=True)
        if job not in JOBS or any(word in "<>|" for word in words):
            continue
        found.append((job, [word for word in words if word not in ("...", *FLAGS)]))
    return found


COMMANDS = sorted({(job, *words) for path in FILES for job, words in commands(path)})


def faults_of(job: str, words: list[str]) -> list[str]:
    if job != "submit":
        return compose_valid(job, words)[1]
    job, *words = words
    cluster = [word for word in words if re.match(r"cluster[.=]", word)]
    cluster = [re.sub("=(NAME|...)$", "=cpu", word) for word in cluster]
    faults = compose_valid("submit", cluster)[1]
    if job == "JOB":
        return faults
    rest = [word for word in words if not re.match(r"cluster[.=]", word)]
    if job != "pipeline":
        return faults + compose_valid(job, rest)[1]
    stages, more = stages_of(rest)
    own = [fault for stage in stages for fault in faults_of(stage.job, _of_the_job(stage.overrides))]
    return faults + more + own


def _of_the_job(words: list[str]) -> list[str]:
    return [word for word in words if not re.match(r"cluster[.=]", word)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_documented_command_is_read(command):
    job, *words = command
    assert faults_of(job, words) == []


def test_commands_are_found():
    assert len(COMMANDS) > 40 and any("{00000..41454}" in " ".join(command) for command in COMMANDS)
