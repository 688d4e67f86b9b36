"""A new run begins with the averaged or raw weights of another run, or of an exported model, at any ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldmscale.checkpoint.folders import complete_checkpoints
from ldmscale.checkpoint.shards import Reader

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

COMMON = [
    "data.workers=0",
    "preview.every_steps=0",
    "tracking.wandb=off",
    "ema.decay=0.5",
    "ema.warmup=false",
]
# Steps so small that they leave the weights as they began.
STILL = ["optim.lr=1e-30", "optim.weight_decay=0", "train.max_steps=1", "seed=9"]


def weights(run: Path, kind: str) -> dict[str, torch.Tensor]:
    return Reader(complete_checkpoints(run / "checkpoints")[-1]).weights("denoiser", kind)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=0, atol=1e-20) for name in other)


def test_a_run_begins_with_the_weights_of_another_one(host: Any, tmp_path: Path) -> None:
    job, keys = ["diffusion", "experiment=smoke", *COMMON], tmp_path / "keys.jsonl"
    host.finish([*job, "run.dir=first", "train.max_steps=3", "optim.lr=1e-2"], keys)
    first = tmp_path / "first"
    averaged, raw = weights(first, "ema"), weights(first, "master")
    assert not same(averaged, raw)
    # The average covers the text transformer, too (docs/numerics.md).
    assert any(name.startswith("text_encoder.") for name in averaged) and averaged.keys() == raw.keys()
    still = [*job, *STILL, "warm_start.path=first"]
    host.finish([*still, "run.dir=averaged", "zero=3", "zero.persistence_threshold=0"], keys)
    assert same(weights(tmp_path / "averaged", "master"), averaged)
    assert same(weights(tmp_path / "averaged", "ema"), averaged)  # the average begins from there too
    host.finish([*still, "run.dir=raw", "zero=1", "warm_start.weights=raw"], keys)
    assert same(weights(tmp_path / "raw", "master"), raw)
    # The same weights through another format: as exported, and as imported from there.
    host.finish(["export", "src=first", "dst=exported", "format=diffusers"], keys, ranks=1)
    host.finish(["import", "src=exported", "dst=imported"], keys, ranks=1)
    for path, settings in (
        ("exported", ["zero=2"]),
        ("imported", ["zero=3", "zero.persistence_threshold=0"]),
    ):
        run = f"from_{path}"
        host.finish([*job, *STILL, f"warm_start.path={path}", f"run.dir={run}", *settings], keys)
        assert same(weights(tmp_path / run, "master"), averaged)
        assert same(weights(tmp_path / run, "ema"), averaged)
    # A wider network or a longer text does not fit, which is reported before anything is made.
    for path, run in (("first", "wider"), ("exported", "longer"), ("imported", "again")):
        told = [*job, *STILL, f"warm_start.path={path}", f"run.dir={run}"]
        assert host.run([*told, "unet.channels=64", "text_encoder.max_tokens=9"], keys) == 2
        log = (tmp_path / "log.txt").read_text()
        assert f"unet.channels=64, but warm_start.path={path} has 32" in log
        assert f"text_encoder.max_tokens=9, but warm_start.path={path} has" in log
        assert not (tmp_path / run).exists()
