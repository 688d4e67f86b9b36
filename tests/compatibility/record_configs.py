"""Makes 1e24f73_configs.json.xz: the values that `ldmscale JOB experiment=NAME --cfg job` prints at commit 1e24f73.

    git worktree add ../at_1e24f73 1e24f73
    python tests/compatibility/record_configs.py ../at_1e24f73

Every job with its defaults, and every experiment with each of the two training jobs that accepts it. Interpolations are
resolved; a mandatory value that is not set stays "???".
"""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

RECORD = Path(__file__).with_name("1e24f73_configs.json.xz")
TRAINING = ("autoencoder", "diffusion")


def printed(checkout: Path, job: str, experiment: str | None) -> object:
    """The resolved values, or None where the job does not take the experiment."""
    choice = [] if experiment is None else [f"experiment={experiment}"]
    done = subprocess.run(
        [sys.executable, "-m", "ldmscale", job, *choice, "--cfg", "job"],
        cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 2 and experiment is not None:
        return None
    if done.returncode:
        raise SystemExit(f"{job} {experiment}: status {done.returncode}\n{done.stderr}")
    return OmegaConf.to_container(OmegaConf.create(done.stdout), resolve=True, throw_on_missing=False)


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    jobs = sorted(path.stem for path in (checkout / "conf").glob("*.yaml") if path.stem != "base")
    experiments = sorted(path.stem for path in (checkout / "conf" / "experiment").glob("*.yaml"))
    pairs = [(job, None) for job in jobs] + [(job, name) for job in TRAINING for name in experiments]
    record = {
        " ".join(filter(None, (job, name))): values
        for job, name in pairs
        if (values := printed(checkout, job, name)) is not None
    }
    RECORD.write_bytes(lzma.compress(json.dumps(record).encode(), preset=9))
    sys.stdout.write(f"{RECORD}: {len(record)} configurations, {RECORD.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
