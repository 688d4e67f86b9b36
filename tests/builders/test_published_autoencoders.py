"""The published first stages as whole experiments: what their authors' configurations say, value by value."""

import pytest
import torch

from ldmscale import build
from ldmscale.builders.networks import build_discriminator
from ldmscale.config import AutoencoderJob, EvaluateJob
from ldmscale.config.checks import check
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import read

# Parameters, images a pass, passes a step, start and weight of the GAN, parameters of the discriminator.
PUBLISHED = {
    "kl_f4": (55_312_063, 12, 2, 50_001, 0.5, 2_765_633),
    "kl_f8": (83_653_863, 12, 2, 50_001, 0.5, 2_765_633),
    "kl_f16": (69_610_963, 12, 2, 50_001, 0.5, 2_765_633),
    "kl_f32": (103_880_131, 12, 2, 50_001, 0.5, 2_765_633),
    "vq_f4": (55_322_782, 8, 1, 0, 0.75, 2_765_633),
    "vq_f4_noattn": (53_219_486, 8, 1, 11, 0.75, 2_765_633),
    "vq_f8": (67_717_295, 10, 1, 1, 0.6, 663_361),
    "vq_f8_n256": (67_652_783, 10, 1, 250_001, 0.75, 2_765_633),
    "vq_f16": (69_593_371, 14, 1, 250_001, 0.75, 663_361),
}
FILES = ["loss.perceptual_weights=pyproject.toml", "loss.perceptual_heads=pyproject.toml"]


def composed(name: str, *overrides: str) -> AutoencoderJob:
    given = [f"experiment=autoencoder_{name}", "data=synthetic", *FILES, *overrides]
    return read(AutoencoderJob, compose_job("autoencoder", given))


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_experiment_is_its_published_configuration(name):
    parameters, batch, passes, start, weight, discriminator = PUBLISHED[name]
    config = composed(name)
    loss = config.loss
    assert (loss.gan, loss.gan_start_step, loss.gan_weight) == ("hinge", start, weight)
    assert (loss.perceptual, loss.perceptual_weight, loss.pixel_weight) == ("lpips_vgg16", 1.0, 1.0)
    assert (loss.logvar, loss.logvar_start) == ("fixed", 0.0)
    assert (loss.reduction, loss.kl_weight) == ("sum" if name.startswith("kl") else "mean", 1e-6)
    assert loss.codebook_weight == 1.0 and (config.codebook.start, config.codebook.revive_after_steps) == (
        "uniform",
        0,
    )
    assert (config.optim.betas, config.optim.weight_decay, config.optim.gradient_clip_norm) == (
        (0.5, 0.9),
        0.0,
        None,
    )
    # lr = accumulation x GPUs x batch x 4.5e-6, whatever the number of GPUs
    assert config.train.rank_micro_batch == batch
    assert config.optim.rate(passes * 8 * batch) == pytest.approx(passes * 8 * batch * 4.5e-6)
    assert config.train.global_batch == passes * 8 * batch
    with torch.device("meta"):
        judge = build_discriminator(loss)
    assert sum(p.numel() for p in judge.parameters()) == discriminator
    autoencoder = build(f"autoencoder_{name}").autoencoder
    assert autoencoder is not None
    assert sum(p.numel() for p in autoencoder.parameters()) == parameters


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["optim.lr=1e-4"], "or optim.lr_scaling=none"),
        (["loss.perceptual_weights=hf://timm/vgg16.tv_in1k/model.safetensors"], "by its sha256"),
        (["codebook.start=kmeans"], "give an autoencoder of kind vq"),
        (["autoencoder.codebook_dim=4"], "give autoencoder.codebook_dim=null"),
    ],
)
def test_what_would_silently_train_something_else_is_refused(overrides, remedy):
    faults = check(composed("kl_f8", *overrides), 8)
    assert any(remedy in fault for fault in faults), faults


def test_an_fid_without_the_file_of_its_network_is_refused():
    given = ["evaluate.model=run", "data.shards=a.tar", "evaluate.features=inception_fid"]
    for more, remedy in (
        ([], "inception_fid needs pt_inception-2015-12-05-6726825d.pth"),
        (["evaluate.features_weights=absent.pth"], "absent.pth: there is no such file"),
    ):
        faults = check(read(EvaluateJob, compose_job("evaluate", [*given, *more])), 1)
        assert any(remedy in fault for fault in faults), faults
