"""Job scripts of folders with hostile names: nothing of a name runs, and each path arrives byte for byte."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ldmscale.cluster.slurm import render
from ldmscale.cluster.submission import Frozen
from ldmscale.config import ClusterConfig
from ldmscale.config.checks.cluster import check_cluster, check_script_paths
from ldmscale.errors import ConfigError
from ldmscale.jobs import submit

# Each would create the file PWNED if a shell ran it, or end up elsewhere if Slurm or a shell expanded it.
HELD = {
    "command": "a$(touch PWNED)b",
    "backticks": "a`touch PWNED`b",
    "single_quotes": "a'; touch PWNED; 'b",
    "double_quotes": 'a"; touch PWNED; "b',
    "semicolons": "a; touch PWNED;",
    "pipes": "a|touch PWNED&&touch PWNED",
    "spaces": " a  b ",
    "dash": "-n --wrap=touch",
    "hash": "#SBATCH --wrap=a # b",
    "patterns": "%j %x%u%%A%",
    "variables": "$HOME ~ ${x:=y} *?[a]",
    "unicode": "räum-名-🙂\u2028\u202e\u00a0",
    "braces": "{1..3} (a) <b> !c ^d =e",
}
REFUSED = {
    "newline": "a\ntouch PWNED #",
    "carriage_return": "a\rb",
    "tab": "a\tb",
    "escape": "a\x1b[2Jb",
    "delete": "a\x7fb",
    "c1": "a\x85b",
    "not_utf8": "a\udcffb",
    "backslash": "a\\b",
}
# Records its arguments, and stands where the frozen code would be.
RANK = """
import json, os, pathlib, sys
pathlib.Path(os.environ["SEEN"]).write_text(json.dumps([sys.argv, os.getcwd(), os.environ["VALUE"]]))
"""
# In the place of Slurm's program: starts the command behind its own options once.
SRUN = '#!/usr/bin/env bash\nwhile [[ ${1:-} == --* ]]; do shift; done\nexec "$@"\n'


def slurm_options(script: str) -> dict[str, str]:
    """Options of the #SBATCH lines as Slurm reads them, patterns of file names replaced."""
    words = [
        shlex.split(line.removeprefix("#SBATCH "))[0] for line in script.split("\n") if line[:7] == "#SBATCH"
    ]
    found = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    values = {"%": "%", "j": "17", "x": "NAME", "u": "USER", "A": "17"}
    found["output"] = re.sub(r"%(.)", lambda match: values[match[1]], found["output"])
    return found


def environment_of(folder: Path, srun: str) -> tuple[dict[str, str], Path]:
    """Variables of a job with another program in the place of srun, and the file that `RANK` writes."""
    programs, seen = folder / "programs", folder / "seen.json"
    programs.mkdir()
    (programs / "srun").write_text(srun)
    (programs / "srun").chmod(0o755)
    own = {"PATH": f"{programs}:{os.environ['PATH']}", "SEEN": str(seen)}
    return os.environ | own | {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "here"}, seen


@pytest.mark.parametrize("name", HELD)
def test_a_script_runs_nothing_of_a_name_and_its_paths_arrive_whole(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "work" / HELD[name]
    frozen = Frozen(folder / "run" / "submissions" / "0001")
    frozen.code.mkdir(parents=True)
    (frozen.code / "start.py").write_text(RANK)
    logs = folder / "run" / "logs"
    logs.mkdir()
    paths = {"run.dir": str(folder / "run"), "the working folder": str(folder)}
    cluster = ClusterConfig(
        nodes=1,
        tasks_per_node=1,
        environment={"VALUE": HELD[name]},
        python=sys.executable,
        partition=HELD[name],
    )
    assert check_script_paths(paths) == [] and check_cluster(cluster) == []
    script = render(frozen, "diffusion", HELD[name], logs, folder, cluster)
    frozen.script.write_text(script)

    environment, seen = environment_of(tmp_path, SRUN)
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        ["bash", str(frozen.script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(seen.read_text()) == [
        [str(frozen.code / "start.py"), "diffusion", "--frozen", str(frozen.config)], str(folder),
        HELD[name].replace("$HOME", os.environ["HOME"]),  # variables of a value are expanded, and nothing else
    ]  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == sorted([*before, seen])  # above all no PWNED
    options = slurm_options(script)
    assert options["output"] == str(logs / "slurm_17.out") and options["chdir"] == str(folder)
    assert (options["job-name"], options["partition"]) == (HELD[name], HELD[name])


def test_the_count_of_failures_is_a_number_and_nothing_else_is_evaluated(tmp_path: Path) -> None:
    frozen = Frozen(tmp_path / "run" / "submissions" / "0001")
    frozen.folder.mkdir(parents=True)
    cluster = ClusterConfig(nodes=1, tasks_per_node=1, max_failures_without_progress=0)
    frozen.script.write_text(render(frozen, "diffusion", "name", tmp_path / "run", tmp_path, cluster))
    environment, _ = environment_of(tmp_path, "#!/usr/bin/env bash\nexit 7\n")
    command = ["bash", str(frozen.script)]
    counts = {"a[$(touch PWNED)]": "1", "PWNED=1": "1", "": "1", "08": "9", "2": "3", "9" * 20: "1"}
    for before, after in counts.items():
        (frozen.folder / "failures_0").write_text(before + "\n")
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 7 and "giving up" in done.stdout, done.stdout + done.stderr
        assert (frozen.folder / "failures_0").read_text() == f"{after}\n", before
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_a_script_cannot_hold_is_refused_with_its_setting(name: str) -> None:
    (fault,) = check_script_paths({"run.dir": f"runs/{REFUSED[name]}", "latents.path": "latents"})
    assert fault.startswith("run.dir='runs/a") and fault.isprintable() and "give another path" in fault


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"partition": "a\nb"}, ["cluster.partition"]),
        ({"options": ("--reservation=a\ntouch PWNED",), "account": "\x00"}, ["cluster.options", "cluster.account"]),
        ({"exclude": ("n1", "n2\n")}, ["cluster.exclude"]),
        ({"environment": {"A": "b\nc"}}, ["cluster.environment"]),
        ({"environment": dict.fromkeys(["A;touch PWNED;B", "", "1A", "Ä", "A\n", "_a1"], "c")}, ["cluster.environment"] * 5),
        ({"python": "-c"}, ["cluster.python"]),
        ({"setup": ("if true; then\n\tmodule load cuda\nfi",)}, []),
        ({"setup": ("module load \x1b[2J",)}, ["cluster.setup"]),
    ],
)  # fmt: skip
def test_settings_of_a_cluster_that_a_script_cannot_hold_are_refused(
    settings: dict, found: list[str]
) -> None:
    faults = check_cluster(ClusterConfig(nodes=1, tasks_per_node=1, **settings))
    assert sorted(re.match(r"[\w.]+", fault)[0] for fault in faults) == sorted(found)
    assert all(fault.isprintable() for fault in faults)


def test_submit_reports_every_such_fault_at_once_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a\ntouch PWNED #"
    folder.mkdir()
    monkeypatch.chdir(folder)
    words = [
        "diffusion",
        "experiment=smoke",
        "cluster=cpu",
        "run.name='a\tb'",
        "run.dir='runs/c\rd'",
        "optim.lr=much",
    ]
    words += ["cluster.partition='e\nf'", "cluster.environment={G-H: i}", "--dry-run"]
    with pytest.raises(ConfigError) as refused:
        submit.main(words)
    text = "\n".join(refused.value.faults)
    for expected in (
        "the working folder=",
        "run.name='a\\tb'",
        "run.dir='runs/c\\rd'",
        "optim.lr",
        "'e\\nf'",
        "'G-H'",
    ):
        assert expected in text, text
    assert not list(folder.iterdir())


def test_a_submission_into_a_folder_with_a_hostile_name_names_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "it's $(touch PWNED); %j #1"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert (
        submit.main(
            ["diffusion", "experiment=smoke", "cluster=cpu", 'run.dir="r\'$(touch PWNED)%x"', "--dry-run"]
        )
        == 0
    )
    run = folder / "r'$(touch PWNED)%x"
    script = (run / "submissions" / "0001" / "job.sbatch").read_text()
    options = slurm_options(script)
    assert options["output"] == str(run / "logs" / "slurm_17.out") and options["chdir"] == str(folder)
    assert list(folder.iterdir()) == [run]
