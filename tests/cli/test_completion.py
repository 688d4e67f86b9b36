"""Completion by a real bash, with the function that `ldmscale --shell-completion install=bash` installs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldmscale.cli import main
from ldmscale.config import JOBS

CHECKOUT = Path(__file__).resolve().parents[2]
ASK = r"""
eval "$(ldmscale --shell-completion install=bash)"
while IFS= read -r line; do
    COMP_LINE=$line COMP_POINT=${#line} COMPREPLY=()
    $(complete -p ldmscale | sed -E 's/.*-F ([^ ]+) .*/\1/') ldmscale 2>&1
    echo "$line -> ${COMPREPLY[*]}"
done
"""


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """What bash completes lines to, by the words of the reply; `ldmscale` is on its path as an installation puts it there."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\n")
    program = folder / "ldmscale"
    program.write_text(f"#!{sys.executable}\nimport sys; from ldmscale.cli import main; sys.exit(main())\n")
    program.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    lines = [
        "ldmscale ", "ldmscale auto", "ldmscale diffusion zero=", "ldmscale diffusion ema.dec", "ldmscale sample sample.pro",
        "ldmscale diffusion experiment=ldm_text", "ldmscale diffusion experiment=smo", "ldmscale diffusion --c",
        "ldmscale submit dif", "ldmscale submit diffusion cluster.nodes", "ldmscale submit diffusion cluster=", "ldmscale -sc ins",
        "ldmscale diffusion train.precision=", f"ldmscale diffusion --config-dir {folder}/conf experiment=mi",
    ]  # fmt: skip
    done = subprocess.run(
        [shutil.which("bash"), "-c", ASK], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(CHECKOUT)}, timeout=240,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    found = dict(line.split(" -> ") for line in done.stdout.splitlines())
    assert list(found) == lines
    return {line.replace(str(folder), ""): words.split() for line, words in found.items()}


@pytest.mark.slow
def test_bash_completes_jobs_groups_options_and_settings(completed):
    assert set(JOBS) <= set(completed["ldmscale "])
    assert completed["ldmscale auto"] == ["autoencoder"]
    # bash replaces what follows the last = only.
    assert completed["ldmscale diffusion zero="] == ["0", "1", "2", "3"]
    assert completed["ldmscale diffusion ema.dec"] == ["ema.decay=", "ema.decays="]
    assert completed["ldmscale sample sample.pro"] == ["sample.prompts="]
    assert completed["ldmscale diffusion experiment=ldm_text"] == ["ldm_text2img_1p45b", "ldm_text2img_256"]
    assert "smoke" in completed["ldmscale diffusion experiment=smo"]
    assert completed["ldmscale diffusion --c"] == ["--cfg", "--config-dir"]
    assert completed["ldmscale diffusion train.precision="] == ["bf16", "fp32"]
    assert completed["ldmscale diffusion --config-dir /conf experiment=mi"] == ["mine"]


@pytest.mark.slow
def test_bash_completes_submissions(completed):
    assert completed["ldmscale submit dif"] == ["diffusion"]
    assert completed["ldmscale submit diffusion cluster.nodes"] == ["cluster.nodes="]
    assert {"cpu", "gpu8"} <= set(completed["ldmscale submit diffusion cluster="])
    assert completed["ldmscale -sc ins"] == ["install=bash"]


@pytest.mark.parametrize(
    "words", [["--shell-completion"], ["-sc"], ["sample", "--shell-completion"], ["-sc", "install=tcsh"]]
)
def test_anything_else_is_answered_with_what_to_write(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert 'eval "$(ldmscale --shell-completion install=bash)"' in said


@pytest.mark.parametrize("words", [["-sc", "install=bash"], ["sample", "--shell-completion", "install=bash"]])
def test_the_script_is_the_same_with_and_without_a_job(words, capsys):
    assert main(words) == 0
    assert "complete -o default -F _ldmscale ldmscale" in capsys.readouterr().out
