"""What counts as a spike, what is written down of a skipped step, and when to go back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ldmscale.config.schema.training import SafetyConfig
from ldmscale.errors import LdmscaleError
from ldmscale.train.engine.engine import nan_if_nonfinite
from ldmscale.train.update_guard import Guard, SpikeDetector


def test_a_deviation_is_counted_in_robust_standard_deviations() -> None:
    detector = SpikeDetector(window=4000, threshold=10.0)
    draws = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2 + 3.0
    detector.losses.extend(draws.tolist())
    assert detector.deviation(4.0) == pytest.approx(5.0, rel=0.05)
    detector.losses.extend([1e6] * 100)  # outliers hardly move it, as a mean and variance would be moved
    assert detector.deviation(4.0) == pytest.approx(5.0, rel=0.1)


def test_nothing_is_a_spike_before_half_a_window_is_there() -> None:
    detector = SpikeDetector(window=10, threshold=3.0)
    detector.losses.extend([1.0, 1.1, 0.9, 1.0])
    assert detector.deviation(1e9) == 0.0
    detector.losses.append(1.05)
    assert detector.deviation(1e9) > 3.0


def steps(guard: Guard, losses: list[float]) -> list[bool]:
    """Which steps the guard wants discarded; the others count as updated."""
    found = []
    for step, loss in enumerate(losses):
        guard.record([f"sample{step}"], torch.tensor(loss))
        found.append(guard.should_skip(step))
        if found[-1]:
            guard.on_skip(step + 1, range(step, step + 1), ["denoiser"])
        else:
            guard.on_update(step + 1)
    return found


def test_spikes_are_told_or_skipped_and_never_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses = [1.0 + 0.01 * (n % 5) for n in range(20)] + [9.0, 1.02]
    options = {"skips_before_rollback": 2, "spike_window": 10, "spike_threshold": 6.0}
    off, told, skipped = (
        Guard(SafetyConfig(spike=spike, **options), tmp_path / spike) for spike in ("off", "log", "skip")
    )
    assert not any(steps(off, losses)) and not caplog.records
    assert not any(steps(told, losses))
    assert "step 21" in caplog.text and "standard deviations above the median" in caplog.text
    assert steps(skipped, losses) == [False] * 20 + [True, False]
    (line,) = (tmp_path / "skip").read_text().splitlines()
    written = json.loads(line)
    assert written["step"] == 21 and written["micro_batches"][0]["keys"] == ["sample20"]
    assert 9.0 not in skipped.detector.losses and skipped.skipped_in_a_row == 0


def test_the_state_of_a_guard_goes_through_json_exactly(tmp_path: Path) -> None:
    options = SafetyConfig(skips_before_rollback=2, spike="skip", spike_window=10)
    guard = Guard(options, tmp_path / "file")
    steps(guard, [1 / 3 + 0.1 * (n % 3) for n in range(12)])
    guard.record(["bad"], torch.tensor(math.nan))
    guard.on_skip(13, range(12, 13), ["denoiser"])
    again = Guard(options, tmp_path / "file")
    again.restore(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state() and again.skipped_in_a_row == 1
    assert "nan" in (tmp_path / "file").read_text()
    again.restore({})  # of an older checkpoint
    assert again.state() == Guard(options, tmp_path / "file").state()


def test_returns_that_do_not_help_end_the_run(tmp_path: Path) -> None:
    guard = Guard(SafetyConfig(skips_before_rollback=2, max_rollbacks=2), tmp_path / "file")
    for number in range(2):
        for step in (5, 6):
            guard.record(["bad"], torch.tensor(math.inf))
            guard.on_skip(step, range(0, 1), ["denoiser"])
        assert guard.must_roll_back
        guard.check_rollback_limit(6)
        before = guard.state()
        guard.restore({"furthest_step": 4})
        guard.on_rollback(before, 4, range(4, 6))
        assert guard.rollbacks == number + 1 and not guard.must_roll_back
    with pytest.raises(LdmscaleError, match=r"safety\.max_rollbacks"):
        guard.check_rollback_limit(6)
    guard.record(["good"], torch.tensor(1.0))
    guard.on_update(5)  # further than ever
    assert guard.rollbacks == 0


def test_a_loss_that_is_not_finite_has_a_gradient_that_is_not() -> None:
    for value in (math.inf, -math.inf, math.nan):
        weight = torch.ones(2, requires_grad=True)
        nan_if_nonfinite(weight.sum() + value).backward()
        assert weight.grad is not None and torch.isnan(weight.grad).all()
    weight = torch.ones(2, requires_grad=True)
    nan_if_nonfinite(3 * weight.sum()).backward()
    assert weight.grad is not None and weight.grad.tolist() == [3.0, 3.0]
