"""The GAN stage on two ZeRO-3 ranks with accumulation against the published rule in plain PyTorch on one device.

The reference below shares only the networks and the data with ldmscale: one graph for the generator, the adaptive weight by
autograd at the last layer's weight (Esser et al. 2021, eq. 7), two torch optimisers, hinge losses.
"""

import json

import pytest
import torch
import torch.nn.functional as F

from ldmscale import load
from ldmscale.builders.networks import build_autoencoder, build_discriminator
from ldmscale.config import AutoencoderJob
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import read
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.index import ShardIndex
from ldmscale.distributed import rng as draws

pytestmark = pytest.mark.distributed

STEPS, START = 6, 2
OVERRIDES = [
    "experiment=smoke", "run.dir=run", f"train.max_steps={STEPS}", f"loss.gan_start_step={START}", "loss.discriminator_norm=group",
    "loss.kl_weight=0.001", "train.global_batch=8", "optim.lr=3e-4",
]  # fmt: skip


def reference(config: AutoencoderJob, shards: list[str]) -> list[dict[str, float]]:
    torch.manual_seed(config.seed)
    generator, discriminator = build_autoencoder(config.autoencoder), build_discriminator(config.loss)
    adam = {"lr": config.optim.lr, "betas": config.optim.betas}
    of_generator = torch.optim.Adam(generator.parameters(), **adam)
    of_discriminator = torch.optim.Adam(discriminator.parameters(), **adam)
    reader = ImageItem(32, config.seed)
    loader = Loader(
        ShardIndex.open(shards), reader, seed=config.seed, rank=0, world=1, global_batch=8, rank_micro_batch=8,
        block_shards=config.data.shuffle_block_shards,
    )  # fmt: skip
    found = []
    for step in range(STEPS):
        whole = next(loader)
        sums: dict[str, float] = {}
        # Two ranks take halves of the batch, each in two passes: pass m sees samples m of both halves.
        for part in ([0, 1, 4, 5], [2, 3, 6, 7]):
            # The same memory layout, hence the same kernels: Adam's first steps turn rounding into whole steps.
            images = (whole["image"][part].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            noise = draws.normal(config.seed, whole["position"][part].tolist(), "posterior", (4, 8, 8))
            reconstruction, posterior = generator(images, noise)
            pixel = (images - reconstruction).abs().mean()
            variance = posterior.logvar.exp()
            kl = 0.5 * (posterior.mean**2 + variance - 1 - posterior.logvar).sum((1, 2, 3)).mean()
            loss = pixel + config.loss.kl_weight * kl
            if step >= START:
                adversarial = -discriminator(reconstruction).mean()
                last = generator.last_layer.weight
                fit_norm = torch.autograd.grad(pixel, last, retain_graph=True)[0].norm()
                gan_norm = torch.autograd.grad(adversarial, last, retain_graph=True)[0].norm()
                weight = (fit_norm / (gan_norm + 1e-4)).clamp(0, 1e4).detach() * config.loss.gan_weight
                loss = loss + weight * adversarial
                sums["weight"] = sums.get("weight", 0) + float(weight) / 2
            (loss / 2).backward(inputs=list(generator.parameters()))
            if step >= START:
                fake = reconstruction.detach()
                hinge = (
                    F.relu(1 - discriminator(images)).mean() + F.relu(1 + discriminator(fake)).mean()
                ) / 2
                (hinge / 2).backward()
                sums["hinge"] = sums.get("hinge", 0) + hinge.item() / 2
            sums["loss"] = sums.get("loss", 0) + loss.item() / 2
        sums["norm"] = float(torch.nn.utils.get_total_norm([p.grad for p in generator.parameters()]))
        if step >= START:
            sums["discriminator_norm"] = float(
                torch.nn.utils.get_total_norm([p.grad for p in discriminator.parameters()])
            )
            of_discriminator.step()
        of_generator.step()
        of_generator.zero_grad()
        of_discriminator.zero_grad()
        found.append(sums)
    return found


def test_the_gan_stage_equals_plain_pytorch(tmp_path, ldmscale):
    done = ldmscale("autoencoder", *OVERRIDES, "zero=3", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    config = read(AutoencoderJob, compose_job("autoencoder", OVERRIDES))
    shards = [str(tmp_path / "run" / "data" / f"{number:05d}.tar") for number in range(2)]
    names = {
        "loss": "loss/total", "weight": "gan/adaptive_weight", "hinge": "gan/discriminator", "norm": "generator/gradient_norm",
        "discriminator_norm": "discriminator/gradient_norm",
    }  # fmt: skip
    for step, expected in enumerate(reference(config, shards)):
        for name, value in expected.items():
            assert lines[step][names[name]] == pytest.approx(value, rel=2e-4), (step, name)
        assert ("gan/adaptive_weight" in lines[step]) == (step >= START)
    # Asked for averaged weights, a run that kept none says that it gave the raw ones.
    assert load(tmp_path / "run", ema=True).autoencoder_average is None
