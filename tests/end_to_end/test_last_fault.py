"""A run that stopped on its data keeps the reason, and `doctor` shows it in place of "start it again"."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from PIL import Image


def ldmscale(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LDMSCALE_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "ldmscale", *words],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_doctor_shows_the_fault_that_ended_a_run(tmp_path: Path) -> None:
    good, cut = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (32, 32), (9, 99, 199)).save(good, "PNG")
    Image.effect_noise((32, 32), 90).convert("RGB").save(cut, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(200):
            data = good.getvalue() if number % 2 else cut.getvalue()[:300]
            info = tarfile.TarInfo(f"{number:04d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    run = [
        "autoencoder", "experiment=smoke", "data=shards", "data.shards=0.tar", "data.image_size=32", "run.dir=run",
        "train.max_steps=1000", "tracking.wandb=off", "data.workers=0",
    ]  # fmt: skip
    done = ldmscale(tmp_path, *run)
    assert done.returncode == 2 and "more than data.max_bad_share=0.01" in done.stderr, done.stderr
    (fault,) = json.loads((tmp_path / "run" / "run.json").read_text())["fault"]
    assert "cannot be used, more than data.max_bad_share=0.01" in fault
    seen = ldmscale(tmp_path, "doctor", "run.dir=run")
    said = seen.stdout + seen.stderr
    # The last whole step was saved in the middle of an accumulation window, and the run goes on from it.
    on = ldmscale(tmp_path, *run, "data.max_bad_share=1", "train.max_steps=12", "data.max_bad_in_a_row=1000")
    assert on.returncode == 0, on.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")
    rows = [json.loads(line) for line in lines if line]
    steps = [
        row["step"] for row in rows if "loss/total" in row
    ]  # the last step has a line of measurements, too
    assert steps == list(range(1, 13))
    assert "fault" not in json.loads((tmp_path / "run" / "run.json").read_text())
    assert "ended with a fault that the same command meets again" in said and "data.max_bad_share" in said
