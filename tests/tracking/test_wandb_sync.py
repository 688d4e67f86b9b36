"""`ldmscale wandb-sync`: a run is sent again from its metrics.jsonl."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from wandb_file import read_wandb_file


def test_a_run_is_sent_as_its_metrics_file_tells_it(ldmscale, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        # A W&B that ran in this process names its service here, and children would write through it.
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "runs" / "old"
    (run / "samples").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"job": "diffusion", "seed": 7}))
    lines = [{"step": step, "loss/total": 1 / step, "odd": "nan"} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(run / "samples" / "step_00000002.png")
    (run / "samples" / "step_00000003.png").write_bytes(b"")  # of a save that was cut
    done = ldmscale("wandb-sync", "run.dir=runs/old", "run_id=5a9c0de1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step_00000003.png is not sent" in done.stderr and "1 pictures" in done.stderr
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    left = read_wandb_file(file)
    losses = [(row["step"], row["loss/total"]) for row in left.history if "loss/total" in row]
    assert losses == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert left.run_id == "5a9c0de1" and left.config["seed"] == 7
    assert [row["step"] for row in left.history if "samples/path" in row] == [2]

    (run / "metrics.jsonl").write_text("torn")
    assert ldmscale("wandb-sync", "run.dir=runs/old", cwd=tmp_path).returncode == 2
    assert "metrics.jsonl" in ldmscale("wandb-sync", "run.dir=runs/none", cwd=tmp_path).stderr
