"""launch/local.sh with the real command line: from any directory, with awkward overrides, to the right exit
status.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LOCAL_SH = Path(__file__).parents[2] / "launch" / "local.sh"


def local_sh(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(LOCAL_SH), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )


def test_overrides_reach_the_job_untouched(tmp_path):
    pattern = """/data/it's "here"/$HOME/{00..03} *.tar"""
    quoted = pattern.replace("'", "\\'")
    done = local_sh(
        "index", f"data.shards='{quoted}'", "data.caption=json:a key", "--cfg", "job", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    data = yaml.safe_load(done.stdout)["data"]
    assert data["shards"] == pattern
    assert data["caption"] == "json:a key"


def test_a_faulty_configuration_ends_with_2_on_any_number_of_ranks(tmp_path):
    for count in ("1", "2"):
        done = local_sh("-n", count, "index", "data.shards=x", "data.no_such_key=1", cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("no_such_key") == 1  # told once, not once a rank


def test_an_unknown_job_ends_with_2(tmp_path):
    assert local_sh("no_such_job", cwd=tmp_path).returncode == 2


def test_without_a_job_the_usage_is_shown(tmp_path):
    done = local_sh(cwd=tmp_path)
    assert done.returncode == 2
    assert "launch/local.sh [-n N] [--cpu] JOB" in done.stderr


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_a_wrong_number_of_ranks_ends_with_2(tmp_path, count):
    assert local_sh("-n", count, "index", cwd=tmp_path).returncode == 2


def test_a_link_to_it_works_from_elsewhere(tmp_path):
    link = tmp_path / "run it"
    link.symlink_to(LOCAL_SH)
    done = subprocess.run(
        [str(link), "index", "--cfg", "job"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def test_a_python_without_the_packages_is_told_how_to_get_them(tmp_path):
    # a checkout without .venv, whose Python has nothing installed
    (tmp_path / "launch").mkdir()
    shutil.copy(LOCAL_SH, tmp_path / "launch")
    (tmp_path / "ldmscale").symlink_to(LOCAL_SH.parents[1] / "ldmscale")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True, timeout=240
    )
    done = subprocess.run(
        [str(tmp_path / "launch" / "local.sh"), "index"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(tmp_path / "empty" / "bin" / "python")},
        timeout=240,
    )
    assert done.returncode == 2
    assert "make install" in done.stderr and "Traceback" not in done.stderr
