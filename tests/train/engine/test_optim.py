"""Learning-rate curves, parameter groups and DeepSpeed's configuration."""

from __future__ import annotations

import pytest
from torch import nn

from ldmscale.train.engine.options import EngineOptions, deepspeed_json, learning_rate, parameter_groups


def test_warm_up_is_linear_and_reaches_the_base() -> None:
    rates = [learning_rate(step, base=2.0, warmup_steps=4) for step in range(6)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(0, base=2.0) == 2.0


@pytest.mark.parametrize("curve", ["linear", "cosine"])
def test_curves_fall_from_base_to_the_final_share_and_stay(curve: str) -> None:
    def rate(step: int) -> float:
        return learning_rate(
            step,
            base=1.0,
            curve=curve,
            warmup_steps=10,
            total_steps=110,
            final_share=0.1,  # type: ignore[arg-type]
        )

    assert rate(10) == 1.0
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == rate(10**6) == pytest.approx(0.1)
    falling = [rate(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_linear_and_cosine_differ_as_they_should() -> None:
    assert learning_rate(25, base=1.0, curve="linear", total_steps=100) == pytest.approx(0.75)
    assert learning_rate(25, base=1.0, curve="cosine", total_steps=100) == pytest.approx(0.853553, abs=1e-6)


def test_an_unknown_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="'square'"):
        learning_rate(3, base=1.0, curve="square", total_steps=5)  # type: ignore[arg-type]


def test_everything_is_decayed_unless_asked_otherwise() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.Conv2d(4, 3, 1))
    network[2].weight.requires_grad_(False)
    (together,) = parameter_groups(network, 0.01)
    assert together["weight_decay"] == 0.01
    assert len(together["params"]) == 5
    decayed, kept = parameter_groups(network, 0.01, decay_vectors=False)
    assert [p.shape for p in decayed["params"]] == [(4, 3, 3, 3)]
    assert kept["weight_decay"] == 0.0 and [p.dim() for p in kept["params"]] == [1, 1, 1, 1]


def test_deepspeed_gets_the_batch_arithmetic_and_fp32_reduction() -> None:
    options = EngineOptions(
        zero_stage=3, precision="bf16", rank_micro_batch=4, accumulation_steps=5, persistence_threshold=7
    )
    config = deepspeed_json(options, 3)
    assert config["train_batch_size"] == 60
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 7
    assert config["bf16"] == {"enabled": True}
    assert config["communication_data_type"] == "fp32" and config["data_types"] == {
        "grad_accum_dtype": "fp32"
    }
    assert config["optimizer"]["params"]["fused"] is config["optimizer"]["params"]["torch_adam"] is True
