"""Run by torchrun: trains with a save in the middle ("straight"), or goes on from such saves ("resume").

Arguments: the file for rank 0's results, the folder of checkpoints, "straight" or "resume".
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from toy import Judge, Toy, batch

from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.errors import CheckpointError
from ldmscale.train.engine.ema import PowerEma, ShardedEma
from ldmscale.train.engine.engine import Engine, sharded_construction
from ldmscale.train.engine.options import EngineOptions, learning_rate
from ldmscale.train.engine.process import connect, disconnect
from ldmscale.train.snapshot import restore, snapshot

DEVICE = torch.device("cpu")
GLOBAL_BATCH, MIDDLE, END = 12, 4, 8


@dataclass(frozen=True)
class Setting:
    stage: int
    precision: str
    threshold: int = 0
    dropout: float = 0.1  # draws from the random state of the rank
    accumulation: int = 2
    judge: bool = False  # a second network in the same checkpoint, which has never been updated


SAME_RANKS = {
    "zero0_fp32": Setting(0, "fp32"),
    "zero0_bf16": Setting(0, "bf16"),
    "zero1_bf16": Setting(1, "bf16"),
    "zero2_fp32": Setting(2, "fp32"),
    "zero3_fp32": Setting(3, "fp32", judge=True),
    "zero3_fp32_persistent": Setting(3, "fp32", threshold=100_000),
    "zero3_bf16_persistent": Setting(3, "bf16", threshold=100_000),
}
ELASTIC = {f"elastic{stage}": Setting(stage, "fp32", dropout=0.0) for stage in (0, 1, 3)}
# On how many ranks -> from which save, as what
CHANGES = {
    1: [
        ("elastic3", Setting(3, "fp32", dropout=0.0)),
        ("elastic3", Setting(1, "fp32", dropout=0.0, accumulation=3)),
        ("elastic0", Setting(3, "fp32", dropout=0.0, threshold=100_000)),
    ],
    2: [
        ("elastic3", Setting(1, "fp32", dropout=0.0)),
        ("elastic3", Setting(0, "fp32", dropout=0.0)),
        ("elastic0", Setting(3, "fp32", dropout=0.0)),
        ("elastic1", Setting(2, "fp32", dropout=0.0)),
    ],
    3: [
        ("elastic3", Setting(3, "fp32", dropout=0.0)),
        ("elastic1", Setting(3, "fp32", dropout=0.0)),
        ("elastic3", Setting(2, "fp32", dropout=0.0, accumulation=1)),
    ],
}


class Run:
    """A denoiser with its average, and perhaps a judge."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        options = EngineOptions(
            zero_stage=setting.stage,
            precision=setting.precision,
            rank_micro_batch=GLOBAL_BATCH // dist.get_world_size() // setting.accumulation,
            accumulation_steps=setting.accumulation,
            gradient_clip_norm=0.3,
            learning_rate=1e-2,
            decay_vectors=False,  # two parameter groups
            persistence_threshold=setting.threshold,
        )
        torch.manual_seed(seed)
        with sharded_construction(options):
            networks = {"denoiser": Toy(dropout=setting.dropout)} | (
                {"judge": Judge()} if setting.judge else {}
            )
        self.engines = {name: Engine(name, network, options, DEVICE) for name, network in networks.items()}
        self.engine = self.engines["denoiser"]
        self.averages = {
            "denoiser": [
                ShardedEma(self.engine.masters, 0.9),
                ShardedEma(self.engine.masters, 0.5, kind="ema_0.5"),
                PowerEma(self.engine.masters, 0.1),
            ]
        }
        self.step = 0
        torch.manual_seed(1000 * seed + dist.get_rank())

    def train(self, until: int) -> list[str]:
        """Losses of this rank, to the last bit."""
        dtype = self.engine.compute_dtype
        share = GLOBAL_BATCH // dist.get_world_size()
        size = share // self.setting.accumulation
        losses = []
        while self.step < until:
            rate = learning_rate(self.step, base=1e-2, curve="cosine", warmup_steps=2, total_steps=END)
            self.engine.set_learning_rate(rate)
            first = self.step * GLOBAL_BATCH + dist.get_rank() * share
            total = 0.0
            for number in range(self.setting.accumulation):
                x, t, y = batch(first + number * size, size)
                loss = F.mse_loss(self.engine(x.to(dtype), t.to(dtype)).float(), y)
                self.engine.backward(loss)
                self.engine.step()
                total += loss.item() * size
            for average in self.averages["denoiser"]:
                average.update()
            self.step += 1
            losses.append(total.hex())
        return losses

    def outputs(self) -> list[str]:
        """What the forward pass sees: by raw weights, by the average, to the last bit."""
        x, t, _ = (column.to(self.engine.compute_dtype) for column in batch(10**6, 3))
        self.engine.network.eval()
        with torch.no_grad():
            raw = self.engine(x, t).double().sum().item()
            with self.engine.averaged_weights(self.averages["denoiser"][0]):
                averaged = self.engine(x, t).double().sum().item()
        self.engine.network.train()
        return [raw.hex(), averaged.hex()]

    def draw(self) -> str:
        """The next number of this rank's random state, which is left as it was."""
        state = torch.get_rng_state()
        number = torch.rand(()).item().hex()
        torch.set_rng_state(state)
        return number

    def save(self, folder: Path) -> str:
        pieces, state = snapshot(self.engines, self.averages)
        trainer = {"step": self.step, "images_seen": self.step * GLOBAL_BATCH}
        return str(CheckpointManager(folder).save(self.step, pieces, state | trainer))

    def load(self, checkpoint: Path) -> None:
        self.step = restore(checkpoint, self.engines, self.averages)["step"]


def everywhere(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def end_of(run: Run, folder: Path) -> dict[str, Any]:
    """Train to the end, and what there is to compare then."""
    losses = everywhere(run.train(END))
    return {
        "losses": losses,
        "outputs": everywhere(run.outputs()),
        "draws": everywhere(run.draw()),
        "checkpoint": run.save(folder),
        "steps_of_adam": sorted({int(state["step"]) for state in run.engine.base_optimizer.state.values()}),
        "counts": [run.engine.updates, run.averages["denoiser"][-1].updates, int(run.engine.network.calls)],
    }


def straight(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, setting in (SAME_RANKS | ELASTIC).items():
        run = Run(setting, seed=0)
        run.train(MIDDLE)
        middle = run.save(folder / name / "straight")
        outputs = run.outputs()
        found[name] = end_of(run, folder / name / "straight") | {"middle": middle}
        # Back to the middle in the same process, whose forward weights are those of the end.
        run.load(Path(middle))
        found[name]["outputs_rolled_back_equal"] = run.outputs() == outputs
        again = end_of(run, folder / name / "again")
        found[name]["again"] = again
    return found


def resume(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    ranks = dist.get_world_size()
    for name, setting in SAME_RANKS.items() if ranks == 2 else ():
        run = Run(setting, seed=7)
        run.load(CheckpointManager(middle_only(folder / name)).newest() or Path())
        found[name] = end_of(run, folder / name / "resumed")
    for number, (name, setting) in enumerate(CHANGES[ranks]):
        run = Run(setting, seed=7)
        run.load(folder / name / "straight" / f"step_{MIDDLE:08d}")
        key = f"{name}_on_{ranks}_as_zero{setting.stage}"
        found[key] = end_of(run, folder / key / str(number)) | {"from": name}
    if ranks == 2:
        found["refusals"] = refusals(folder)
    return found


def middle_only(folder: Path) -> Path:
    """A folder of checkpoints that knows the middle one only."""
    alone = folder / "middle"
    if dist.get_rank() == 0:
        alone.mkdir()
        (alone / f"step_{MIDDLE:08d}").symlink_to(folder / "straight" / f"step_{MIDDLE:08d}")
    dist.barrier()
    return alone


def refusals(folder: Path) -> dict[str, Any]:
    """What must not work, with the messages."""
    run = Run(replace(SAME_RANKS["zero3_fp32"], dropout=0.0, judge=False), seed=3)
    checkpoint = folder / "zero3_fp32" / "straight" / f"step_{MIDDLE:08d}"
    before = run.outputs()
    options = run.engine.options
    wider = Engine("denoiser", Toy(channels=11), options, DEVICE)
    attempts = {
        "other_shape": lambda: restore(checkpoint, {"denoiser": wider}, {}),
        "other_name": lambda: restore(checkpoint, {"generator": run.engine, "judge": wider}, {}),
        "in_window": lambda: snapshot(run.engines, run.averages),
        "in_average": lambda: snapshot(run.engines, run.averages),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            if name == "in_average":
                with run.engine.averaged_weights(run.averages["denoiser"][0]):
                    attempt()
            elif name == "in_window":
                x, t, y = batch(0, options.rank_micro_batch)
                run.engine.backward(F.mse_loss(run.engine(x, t), y))
                run.engine.step()
                attempt()
            else:
                attempt()
            messages[name] = "nothing was raised"
        except (CheckpointError, RuntimeError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
        if name == "in_window":
            x, t, y = batch(0, options.rank_micro_batch)
            run.engine.backward(F.mse_loss(run.engine(x, t), y))
            run.engine.step()
            before = run.outputs()
    return {"messages": messages, "unchanged": run.outputs() == before}


def main() -> None:
    connect(DEVICE)
    found = {"straight": straight, "resume": resume}[sys.argv[3]](Path(sys.argv[2]))
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    disconnect()


main()
