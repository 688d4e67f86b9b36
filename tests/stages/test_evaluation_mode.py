"""Stages evaluate in evaluation mode and train in the mode of before, also after a forward that raises."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.diffusion.sample_latents import SamplerOptions
from ldmscale.distributed.environment import Ranks
from ldmscale.models.conditions import ClassEmbedder, Conditions
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.evaluation_mode import evaluation_mode
from ldmscale.models.first_stage import LatentScale
from ldmscale.models.unet import UNet
from ldmscale.stages.diffusion import DiffusionStage, Preview, PreviewGroup
from ldmscale.stages.first_stage import FirstStage
from ldmscale.stages.objective import Objective
from ldmscale.stages.validation import HeldOut
from ldmscale.train.engine.ema import ShardedEma
from ldmscale.train.engine.engine import Engine
from ldmscale.train.engine.options import EngineOptions
from ldmscale.train.engine.process import connect, disconnect

sys.path.insert(0, str(Path(__file__).parent))
import gan_case as case
from gan_stage import batch as image_batch
from gan_stage import stage_of

DEVICE = torch.device("cpu")
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    connect(DEVICE)
    yield
    disconnect()


def diffusion_stage(classes: ClassEmbedder | None) -> DiffusionStage:
    """Held-out samples and preview come with labels where there are classes, and with too many where there are none."""
    torch.manual_seed(0)
    width = None if classes is None else classes.width
    unet = UNet(
        in_channels=4, out_channels=4, channels=32, channel_mult=(1,), blocks_per_level=1, attention_levels=(0,),
        heads=2, context_dim=width, dropout=0.1,
    )  # fmt: skip
    engine = Engine("denoiser", Denoiser(unet, class_embedder=classes), EngineOptions(0, "fp32", 2), DEVICE)
    return DiffusionStage(
        denoiser=engine,
        averages=[ShardedEma(engine.masters, 0.9)],
        first_stage=FirstStage(None, LatentScale(torch.zeros(4), torch.ones(4)), DEVICE),
        schedule=NoiseSchedule.make("linear", 100, 0.0015, 0.0195),
        objective=Objective("eps", "l2", caption_dropout=0.5),
        preview=Preview(
            (PreviewGroup(("one", "two"), Conditions(labels=torch.tensor([0, 1])), SHAPE),),
            first_seed=0,
            sampler=SamplerOptions(steps=2, guidance=1.0),
        ),
        latent_shapes=[SHAPE],
        seed=0,
        ranks=Ranks(0, 1, 0, 1),
        held_out=HeldOut([batch(labels=True)], 2, 1),
    )


def batch(*, labels: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *SHAPE, generator=generator)
    found = {"position": torch.tensor([0, 1]), "key": ["a", "b"], "latent": latents}
    return found | ({"label": torch.tensor([0, 1])} if labels else {})


def modes(network: nn.Module) -> list[bool]:
    return [module.training for module in network.modules()]


def test_the_mode_of_every_module_comes_back_and_pretrained_parts_stay_in_evaluation_mode() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout()), nn.BatchNorm1d(2).eval())
    before = modes(network)
    with evaluation_mode(network):
        assert not any(modes(network))
    assert modes(network) == before and len(set(before)) == 2
    with pytest.raises(RuntimeError, match="shapes"), evaluation_mode(network):
        network(torch.ones(1, 3))
    assert modes(network) == before
    with evaluation_mode(network.eval()):
        pass
    assert not any(modes(network))


def test_a_diffusion_stage_whose_forward_raises_trains_in_the_mode_of_before() -> None:
    stage = diffusion_stage(None)
    engine = stage.engines["denoiser"]
    before, masters = modes(engine.network), [master.clone() for master in engine.masters]
    stage.averages["denoiser"][0].averages[0].zero_()
    raising: list[Callable[[], Any]] = [
        lambda: stage.answer(batch(labels=True)),
        lambda: list(stage.pictures()),
        stage.validate,
    ]
    for evaluate in raising:
        with pytest.raises(ValueError, match="reads no labels"):
            evaluate()
        assert modes(engine.network) == before and all(before)
        assert all(torch.equal(a, b) for a, b in zip(engine.masters, masters, strict=True))
    answers = [stage.answer(batch(labels=False)) for _ in range(2)]
    assert torch.equal(*answers), "dropout"


def test_an_autoencoder_stage_whose_forward_raises_trains_in_the_mode_of_before() -> None:
    stage = stage_of(case.Case("kl", "batch"), 0, ema=0.9)
    engine = stage.engines["generator"]
    before = modes(engine.network)
    broken = image_batch(0, 0)
    broken = broken | {"image": broken["image"][:, :2], "counts": broken["position"] >= 0}
    stage.preview_batch, stage.scale_batches = broken, lambda: iter([broken])
    for evaluate in (lambda: stage.answer(broken), lambda: list(stage.pictures()), stage.finish):
        with pytest.raises(RuntimeError, match="channels"):
            evaluate()
        assert modes(engine.network) == before and all(before)
        engine.refuse_averaged("training")
    loss, _ = stage.micro_step(image_batch(0, 0), 0)
    assert loss.isfinite()


@pytest.mark.parametrize("null_class", [None, False, True])
def test_only_a_model_with_a_null_condition_logs_what_share_was_dropped(null_class: bool | None) -> None:
    embedder = None if null_class is None else ClassEmbedder(classes=3, width=16, null_class=null_class)
    stage = diffusion_stage(embedder)
    _, metrics = stage.micro_step(batch(labels=embedder is not None), 0)
    assert ("text/dropped" in metrics) == bool(null_class)
    assert float(metrics.get("text/dropped", torch.tensor(0.0))) in (0.0, 0.5, 1.0)
