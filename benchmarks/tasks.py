"""Whether small task models follow their conditions: trains each on the quickstart's sprites and measures one figure.

    ldmscale quickstart; python -m benchmarks.tasks all runs/quickstart
    python -m benchmarks.tasks layout_small runs/quickstart       one of them
    python -m benchmarks.tasks table                              what has been measured, as a table

Of the quickstart's folder the shards, the autoencoder and the latents are used, made once for all tasks. A run goes to
runs/TASK, its figures to runs/TASK/task.json, a picture to runs/TASK/task.png. Training goes on where it was interrupted,
and a finished run is only measured again. `benchmarks/task_figures.py` says what each figure is.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.task_figures import FIGURES, WITH_LATENTS, measure, shards_of
from ldmscale.launcher import launch

TASKS = tuple(FIGURES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=(*TASKS, "all", "table"))
    parser.add_argument("quickstart", type=Path, nargs="?", help="run folder of a finished quickstart")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--images", type=int, default=96, help="that are drawn, at most")
    parser.add_argument("--steps", type=int, default=30, help="of the sampler")
    parser.add_argument("overrides", nargs="*", help="of the training, such as train.max_steps=20")
    given = parser.parse_intermixed_args()  # options may stand among the overrides
    if given.task == "table":
        print(table(Path("runs")))
        return
    if given.quickstart is None:
        parser.error("give the run folder of a finished quickstart")
    for task in TASKS if given.task == "all" else (given.task,):
        run = Path("runs") / task
        train(task, run, given.quickstart.absolute(), given.ranks, given.overrides)
        figures = measure(task, run, given.quickstart.absolute(), given.images, given.steps)
        figures |= {"train_seconds": train_seconds(run), "ranks": given.ranks}
        (run / "task.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(json.dumps(figures, indent=1), flush=True)


def train(task: str, run: Path, source: Path, ranks: int, overrides: list[str]) -> None:
    """Train the experiment of a task; SystemExit with the job's status where that fails."""
    shards = str(source / "latents" / "*.tar") if task in WITH_LATENTS else shards_of(task, source, "train")
    status = launch(
        [
            "diffusion", f"experiment={task}", f"data.shards='{shards}'",
            f"data.heldout_shards='{shards_of(task, source, 'heldout')}'",
            f"first_stage.path='{source}/autoencoder'", f"run.dir={run}", *overrides,
        ],
        ranks,
    )  # fmt: skip
    if status:
        raise SystemExit(status)


def train_seconds(run: Path) -> float:
    """Seconds of all training steps at the run's median pace: no start, no pictures, no checkpoints, no other's load."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    taken = {line["step"]: line["time/step_seconds"] for line in lines if "time/step_seconds" in line}
    return max(taken) * statistics.median(taken.values()) if taken else 0.0


def table(runs: Path) -> str:
    """What the runs' task.json say, as markdown."""
    rows = [
        "| task | figure | model | chance | first stage | steps, seconds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for task in TASKS:
        file = runs / task / "task.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"figures": {}}
        for name, figure in found["figures"].items():
            cells = [
                f"{figure[key]:.2f}" if key in figure else "-" for key in ("model", "chance", "first_stage")
            ]
            rows.append(
                f"| `{task}` | {name} | {' | '.join(cells)} | {found['trained_steps']}, {found['train_seconds']:.0f} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
