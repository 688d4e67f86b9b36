"""The wheel is whole: installed elsewhere, ldmscale finds its configuration and its launcher."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def test_the_wheel_works_outside_the_checkout(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*build, "--wheel-dir", str(tmp_path), str(CHECKOUT)], check=True, cwd=tmp_path, timeout=240
    )
    (wheel,) = tmp_path.glob("ldmscale-*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    for file in ("conf/diffusion.yaml", "launch/local.sh", "py.typed"):
        assert (site / "ldmscale" / file).is_file(), file

    def run(*command: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(
        sys.executable, "-c", "from ldmscale.config.folders import config_folder; print(config_folder())"
    )
    assert Path(where.strip()) == site / "ldmscale" / "conf"
    assert "unet:" in run(sys.executable, "-m", "ldmscale", "diffusion", "--cfg", "job")
    local_sh = str(site / "ldmscale" / "launch" / "local.sh")
    assert "unet:" in run("env", f"PYTHON={sys.executable}", "bash", local_sh, "diffusion", "--cfg", "job")
    assert list(elsewhere.iterdir()) == []
