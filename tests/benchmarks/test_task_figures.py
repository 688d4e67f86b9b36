"""The figures of the small tasks, where their values are known by hand. No model is drawn from here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.task_figures import (
    FIGURES,
    SIZE,
    _among,
    _cut,
    _drawn_boxes,
    _inside,
    _iou,
    _psnr,
    _seen,
    shards_of,
)
from benchmarks.tasks import TASKS, table, train_seconds
from ldmscale.data.conditions.boxes import Box

LEFT, TOP = Box(3, 0.0, 0.0, 0.5, 1.0), Box(1, 0.0, 0.0, 1.0, 0.5)


def test_every_small_experiment_has_its_figure() -> None:
    folder = Path(__file__).resolve().parents[2] / "conf" / "experiment"
    assert sorted(TASKS) == sorted(file.stem for file in folder.glob("*_small.yaml")) == sorted(FIGURES)


def test_what_fills_its_box_has_an_iou_of_one_and_that_of_another_layout_less() -> None:
    image = torch.ones(1, 3, SIZE, SIZE)
    image[:, 1, :, : SIZE // 2] = 0.4  # a tint is seen, too
    assert _iou(_seen(image), _inside([LEFT])[None]) == 1.0
    assert _iou(_seen(image), _inside([TOP])[None]) == pytest.approx(1 / 3)
    assert _iou(_seen(image), _inside([LEFT, TOP])[None]) == pytest.approx(2 / 3)
    assert _iou(_seen(torch.ones_like(image)), _inside([])[None]) == 0.0
    assert _cut(image[0], LEFT)[1].max() == pytest.approx(0.4)
    assert (_drawn_boxes([LEFT])[:, SIZE // 2 :] == 255).all()


def test_psnr_is_of_the_hole_alone() -> None:
    real = torch.zeros(2, 3, SIZE, SIZE)
    where = torch.zeros_like(real, dtype=torch.bool)
    where[:, :, :4] = True
    wrong = real + 0.2 * where + 0.9 * ~where
    assert _psnr(wrong, real, where) == pytest.approx(20.0)  # 10 log10(4 / 0.04)


def test_pictures_like_the_real_ones_lie_among_them_and_noise_does_not() -> None:
    draws = torch.Generator().manual_seed(0)
    real = torch.randn(60, 1, 2, 2, generator=draws)
    assert _among(real[:20], real, own=True) > 0.5
    assert _among(real.roll(1, 0)[:20] + 0.01, real) == 1.0
    assert _among(10 + torch.randn(20, 1, 2, 2, generator=draws), real) == 0.0


def test_the_table_is_of_what_was_measured(tmp_path: Path) -> None:
    run = tmp_path / "class_small"
    run.mkdir()
    figures = {"class of the nearest": {"model": 0.875, "chance": 0.2}}
    record = {"figures": figures, "trained_steps": 220, "train_seconds": 181.4}
    (run / "task.json").write_text(json.dumps(record))
    rows = table(tmp_path).splitlines()
    assert rows[2:] == ["| `class_small` | class of the nearest | 0.88 | 0.20 | - | 220, 181 |"]
    lines = [{"step": at, "time/step_seconds": taken} for at, taken in ((20, 0.5), (40, 9.0), (60, 0.6))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 65}]))
    assert train_seconds(run) == pytest.approx(60 * 0.6)  # the pause in the middle does not count
    assert shards_of("layout_small", Path("q"), "train") == "q/data/scenes-train-*.tar"
