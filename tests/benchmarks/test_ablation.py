"""What the ablation makes of its runs; the runs themselves take an hour."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image

from benchmarks import ablation
from benchmarks.ablation import MODELS, Judge, Point, plan, seconds_until, table, training
from benchmarks.curves import Curve, draw_panels
from ldmscale import build
from ldmscale.config import DiffusionJob
from ldmscale.config.checks import check
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import read
from ldmscale.data.shards.index import ShardIndex
from ldmscale.inference.prompt_score import read_images


def test_the_four_models_have_as_many_parameters_and_no_fault_but_their_missing_data(tmp_path: Path) -> None:
    counts = []
    for model in MODELS:
        job, *overrides = training(model, tmp_path, steps=10, points=2, ranks=1)
        config = read(DiffusionJob, compose_job(job, overrides))
        told = [fault for fault in check(config, 1) if str(tmp_path) not in fault]
        assert told == [] and config.autoencoder.factor == model.factor
        unet = build("unconditional_small", [o for o in overrides if o.startswith("unet.")]).unet
        assert unet is not None
        counts.append(sum(weight.numel() for weight in unet.parameters()))
    assert max(counts) < 1.12 * min(counts)


def test_seconds_are_at_the_usual_pace_and_a_plan_in_steps_is_the_same_for_all(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss/total": 1.0},
        {"step": 4, "time/step_seconds": 0.5},
        {"step": 8, "time/step_seconds": 1.5},
        {"step": 8, "time/step_seconds": 0.25},  # taken again after a resume
        {"step": 12, "time/step_seconds": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert seconds_until(tmp_path, 8) == pytest.approx(8 * 0.5)  # the median of 0.5, 0.25 and 3
    assert set(plan(tmp_path, 1.0, 11, 5, 1).values()) == {10}


def test_the_judge_finds_images_nearer_that_are_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "DIRECTIONS", 8)
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(24, 3, 32, 32, generator=generator) * 2 - 1
    judge = Judge(real)
    assert judge.distance(real) == pytest.approx(0, abs=1e-6)
    noise = torch.randn(real.shape, generator=generator)
    near, far = (judge.distance((real + amount * noise).clamp(-1, 1)) for amount in (0.2, 1.0))
    assert 0 < near < far


def test_table_and_figure_tell_every_point(tmp_path: Path) -> None:
    points = [Point(10 * i, 640 * i, 5.0 * i, 90.0 / i) for i in (1, 2)]
    row = {
        "name": "LDM-4",
        "latent": "4x8x8",
        "parameters": 2_000_000,
        "flops": 10**9,
        "points": points,
        "bound": 3.0,
    }
    given = Namespace(steps=20, ranks=1, first_stage_steps=5, images=8, sampler_steps=3, points=2)
    told = table([row], given, 100)
    assert "| LDM-4 | 4x8x8 | 2.00 M | 1.00 | 128 | 1280 | 10 | 45.0 | 3.0 |" in told
    assert "| LDM-4 | 90.0 | 45.0 |" in told
    draw_panels(
        tmp_path / "a.png", [("x", [Curve("LDM-4", [(p.seconds, p.distance) for p in points])])] * 2, "y"
    )
    with Image.open(tmp_path / "a.png") as picture:
        assert (44, 160, 44) not in (colours := {c for _, c in picture.getcolors(1 << 16)}) and (
            214,
            39,
            40,
        ) in colours
    assert (tmp_path / "a.png").stat().st_size < 150_000


def test_the_judges_images_are_all_that_there_are(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "train-00000.tar")) as tar:
        for number in range(3):
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(picture, "PNG")
            told = {
                "__key__": f"k{number}",
                "png": picture.getvalue(),
                "txt": "a square",
                "json": {"class": "square"},
            }
            tar.write(told)
    shards = [str(tmp_path / "train-00000.tar")]
    ShardIndex.open(shards, build_missing=True)
    real = read_images(shards, [], 32)
    assert real.keys == ["k0", "k1", "k2"] and real.classes == ["square"] * 3 and real.trained == 3
    assert [round(float(value), 2) for value in real.pixels[:, 0, 0, 0]] == [-1.0, -0.37, 0.25]
