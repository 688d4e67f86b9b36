"""The command line: fast answers, Hydra's flags, and exit status 2 with every fault at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldmscale.cli import JOB_SUMMARIES, main
from ldmscale.config import JOBS

CHECKOUT = Path(__file__).resolve().parents[2]


def python(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
        timeout=240,
    )


def test_help_lists_every_job_without_importing_torch_or_hydra(tmp_path):
    code = (
        "import sys; from ldmscale.cli import main; status = main(['--help']);"
        "assert not {'torch', 'hydra', 'deepspeed', 'pydantic'} & set(sys.modules), sorted(sys.modules);"
        "sys.exit(status)"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(job in done.stdout for job in JOBS)


def test_every_listed_job_exists_and_every_job_is_listed():
    folder = CHECKOUT / "ldmscale" / "jobs"
    assert set(JOB_SUMMARIES) == set(JOBS)
    assert all(
        (folder / f"{job.replace('-', '_')}.py").is_file() and (CHECKOUT / "conf" / f"{job}.yaml").is_file()
        for job in JOBS
    )


def test_a_bad_configuration_is_refused_without_importing_torch(tmp_path):
    code = (
        "import sys; from ldmscale.cli import main; status = main(['diffusion', 'train.max_stepz=3']);"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = python(code, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "did you mean train.max_steps" in done.stderr


def test_a_pattern_that_the_shell_expanded_is_refused_and_one_that_was_quoted_is_read(capsys, tmp_path):
    assert main(["index", *(f"data.shards={tmp_path}/{number}.tar" for number in range(3))]) == 2
    assert "data.shards is given 3 times" in capsys.readouterr().err
    assert (
        main(["latents", "first_stage.path=a", "latents.path=b", f"data.shards={tmp_path}/{{0..2}}.tar"]) == 2
    )
    assert f"shard {tmp_path}/2.tar does not exist" in capsys.readouterr().err


def test_an_unknown_job_names_the_nearest_one(capsys):
    assert main(["difusion"]) == 2
    assert "did you mean diffusion?" in capsys.readouterr().err


@pytest.mark.parametrize("job", sorted(JOBS))
def test_hydra_flags_work_for_every_job(job, tmp_path):
    code = f"import sys; from ldmscale.cli import main; sys.exit(main([{job!r}, '--cfg', 'job']))"
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "???" in done.stdout or job in ("quickstart", "submit", "doctor")


def test_job_help_shows_groups(tmp_path):
    done = python(
        "import sys; from ldmscale.cli import main; sys.exit(main(['diffusion', '--help']))", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "text2img_1p45b" in done.stdout
    assert "zero: 0, 1, 2, 3" in done.stdout


def test_zero_is_chosen_by_number_also_in_a_sweep(tmp_path):
    code = (
        "import sys; from ldmscale.cli import main; sys.exit(main(['diffusion', 'zero=1', '--cfg', 'job']))"
    )
    assert "stage: 1" in python(code, tmp_path).stdout
    code = (
        "import sys; from ldmscale.cli import main;"
        "sys.exit(main(['diffusion', '--multirun', 'zero=0,2', 'train.global_batch=nonsense']))"
    )
    done = python(code, tmp_path)
    assert done.returncode == 2, done.stderr


def test_all_faults_of_a_command_line_are_told_at_once(capsys, tmp_path):
    status = main(
        [
            "diffusion",
            "experiment=smoke",
            f"run.dir={tmp_path}/run",
            "unet=tinny",
            "optim.lrr=1e-3",
            "nonsense=1",
            "train.precision=fp8",
            "train.global_batch=7",
            "unet.heads=7",
            "+optim.momentum=0.9",
        ]
    )
    said = capsys.readouterr().err
    assert status == 2
    assert "unet=tinny: there is no conf/unet/tinny.yaml" in said
    assert "optim.lrr is unknown: did you mean optim.lr" in said
    assert "nonsense is unknown" in said
    assert "train.precision='fp8'" in said and "'bf16' or 'fp32'" in said
    # Faults of the mixture are found although other values are faulty.
    assert "unet.heads=7 does not divide" in said
    assert "train.global_batch=7 is no multiple" in said
    assert "optim.momentum is unknown" in said
    assert not (tmp_path / "run").exists()
