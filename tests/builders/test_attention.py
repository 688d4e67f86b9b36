"""The attention backend is probed at the model's own head sizes; only `auto` may fall back, and says so."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Iterator

import pytest
import torch

from ldmscale.builders import attention as attention_choice
from ldmscale.builders.attention import (
    autoencoder_head_channels,
    choose_attention,
    diffusion_head_channels,
    usable_attention,
    wanted_attention,
)
from ldmscale.config import AutoencoderJob, DiffusionJob
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import read
from ldmscale.errors import ConfigError
from ldmscale.models import attention as door
from ldmscale.models.attention import current_backend, set_backend

CPU = torch.device("cpu")
SIZES = {torch.float32: [40, 512]}
MISSING = importlib.util.find_spec("xformers") is None
# xformers has no operator for CPUs; where it is not installed, that is what is said.
SAYS = "xformers is not installed" if MISSING else "xformers fails at head size 40 float32"


@pytest.fixture(autouse=True)
def _backend_is_put_back() -> Iterator[None]:
    before = current_backend()
    yield
    set_backend(before)


def diffusion(*overrides: str) -> DiffusionJob:
    given = ["data.shards=x", "train.global_batch=8", "train.rank_micro_batch=8", *overrides]
    return read(DiffusionJob, compose_job("diffusion", given))


def test_the_published_head_sizes_are_probed_and_the_first_stage_in_fp32() -> None:
    found = diffusion_head_channels(diffusion("first_stage.path=x"), torch.bfloat16)
    assert {dtype: sorted(set(sizes)) for dtype, sizes in found.items()} == {
        torch.bfloat16: [40, 64, 80, 160],
        torch.float32: [512],
    }
    without = diffusion_head_channels(diffusion("experiment=ldm_class_f4"), torch.float32)
    assert sorted(set(without[torch.float32])) == [384, 576, 960]


def test_each_published_first_stage_has_its_own_head_sizes() -> None:
    def sizes(name: str) -> list[int]:
        given = ["data.shards=x", "train.global_batch=8", "train.rank_micro_batch=8", f"autoencoder={name}"]
        given += ["loss.perceptual_weights=a", "loss.perceptual_heads=b"]
        return autoencoder_head_channels(read(AutoencoderJob, compose_job("autoencoder", given)).autoencoder)

    assert sizes("kl_f8") == [512] and sizes("kl_f32") == [512, 512, 512] and sizes("vq_f4_noattn") == []


def test_a_backend_that_was_asked_for_must_work() -> None:
    set_backend("plain")
    with pytest.raises(ConfigError, match=f"train.attention=xformers: {SAYS}.*give train.attention=auto"):
        choose_attention("xformers", SIZES, CPU)
    assert current_backend() == "plain"


def test_auto_falls_back_from_what_this_device_prefers_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(attention_choice.PREFERRED, "cpu", "xformers")
    choice = choose_attention("auto", SIZES, CPU)
    assert (choice.wanted, choice.backend, current_backend()) == ("auto", "sdpa", "sdpa")
    assert choice.fault is not None and choice.fault.startswith(SAYS)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(SAYS) and warning.endswith("attention uses sdpa instead")
    assert list(choice.differences) == ["40 float32", "512 float32"]


def test_auto_takes_sdpa_on_a_cpu_without_a_word_of_warning(caplog: pytest.LogCaptureFixture) -> None:
    choice = choose_attention("auto", SIZES, CPU)
    assert (choice.backend, choice.fault) == ("sdpa", None)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_backend_passes_its_probe_at_every_published_head_size(dtype: torch.dtype) -> None:
    choice = choose_attention("plain", {dtype: [32, 40, 64, 80, 160, 512]}, CPU)
    assert choice.backend == current_backend() == "plain"
    assert len(choice.differences) == 6
    assert all(0 < d.forward < 0.03 and 0 < d.backward < 0.03 for d in choice.differences.values())
    assert json.loads(json.dumps(choice.plain()))["largest_difference"]


@pytest.mark.parametrize(("wrong", "said"), [(1.001, "1.0e-03"), (math.nan, "inf")])
def test_a_backend_that_is_wrong_at_one_head_size_is_found_out(
    monkeypatch: pytest.MonkeyPatch, wrong: float, said: str
) -> None:
    right = door.attention

    def broken(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: door.Backend | None = None
    ) -> torch.Tensor:
        out = right(q, k, v, backend)
        return out * wrong if backend == "plain" and q.shape[-1] == 512 else out

    monkeypatch.setattr(door, "attention", broken)
    with pytest.raises(
        ConfigError, match=rf"differs from SDPA at head size 512 float32 by {said} \(forward\)"
    ):
        choose_attention("plain", SIZES, CPU)


def test_compiled_blocks_take_sdpa_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = read(
        DiffusionJob, compose_job("diffusion", ["experiment=smoke_diffusion", "train.compile=blocks"])
    )
    with caplog.at_level(logging.INFO):
        assert wanted_attention(config.train) == "sdpa"
    assert [record.message for record in caplog.records if "train.compile=blocks" in record.message] == [
        "train.compile=blocks: attention by SDPA, which is compiled with the block; xformers is not"
    ]


def test_the_doctors_line_says_which_attention_ran_and_how_exactly() -> None:
    found = usable_attention(CPU)
    assert (
        found.fault is None
        and found.line.startswith("sdpa, within ")
        and found.line.endswith("of SDPA in fp32")
    )


@pytest.mark.skipif(not MISSING, reason="xformers is installed")
def test_a_preferred_attention_that_is_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_choice.PREFERRED, "cpu", "xformers")
    found = usable_attention(CPU)
    assert found.line == "sdpa" and found.fault is not None
    assert found.fault.startswith("xformers is not installed") and found.fault.endswith("attention uses sdpa")
