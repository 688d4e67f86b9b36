"""The published training step of stage 1 in plain PyTorch on one device: two optimisers, one graph, autograd for the rest."""

from __future__ import annotations

import gan_case as case
import torch
import torch.nn.functional as F

from ldmscale.distributed import rng as draws


def reference(setting: case.Case) -> list[dict[str, float]]:
    torch.manual_seed(0)
    generator, judge = case.autoencoder(setting.kind), case.discriminator(setting.norm)
    s = torch.zeros((), requires_grad=True)
    adam = {"lr": case.RATE, "betas": case.BETAS, "eps": case.EPS[setting.kind]}
    trained = [*generator.parameters(), s] if setting.of_kl else list(generator.parameters())
    of_generator = torch.optim.Adam(trained, **adam)
    of_judge = torch.optim.Adam(judge.parameters(), **adam)
    found = []
    for step in range(case.STEPS):
        sums: dict[str, float] = {}

        def add(name: str, value: torch.Tensor, sums: dict[str, float] = sums) -> None:
            sums[name] = sums.get(name, 0.0) + float(value.detach()) / case.PASSES

        for number in range(case.PASSES):
            pixels, positions = case.images(step, number)
            x = (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            noise = draws.normal(0, positions, "posterior", (4, 8, 8)) if setting.of_kl else None
            made, bottleneck = generator(x, noise)
            each = (x - made).abs() + case.PERCEPTUAL * case.distance(x, made)[:, None, None, None]
            if setting.of_kl:
                fit = (each / s.exp() + s).sum() / len(x)
                variance = bottleneck.logvar.exp()
                kl = 0.5 * (bottleneck.mean**2 + variance - 1 - bottleneck.logvar).sum() / len(x)
                loss = fit + case.KL_WEIGHT * kl
            else:
                fit = each.mean()
                loss = fit + case.CODEBOOK_WEIGHT * bottleneck.loss
            playing = step >= case.START
            if playing:
                adversarial = -judge(made).mean()
                last = generator.last_layer.weight
                of_fit = torch.autograd.grad(fit, last, retain_graph=True)[0].norm()
                of_gan = torch.autograd.grad(adversarial, last, retain_graph=True)[0].norm()
                weight = (of_fit / (of_gan + 1e-4)).clamp(0, 1e4).detach() * case.GAN_WEIGHT
                loss = loss + weight * adversarial
                add("gan/adaptive_weight", weight)
            add("loss/total", loss)
            (loss / case.PASSES).backward(inputs=trained)
            if playing:
                real_images = x.detach().requires_grad_(True)
                real, fake = judge(real_images), judge(made.detach())
                if setting.of_kl:
                    against = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
                else:
                    against = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
                add("gan/discriminator", against)
                if setting.of_kl and step % case.R1_EVERY == 0:
                    of_images = real.mean((1, 2, 3)).sum()
                    (slope,) = torch.autograd.grad(of_images, real_images, create_graph=True)
                    r1 = slope.square().sum((1, 2, 3)).mean() / 2
                    add("gan/r1", r1)
                    against = against + case.R1_WEIGHT * case.R1_EVERY * r1
                (against / case.PASSES).backward(inputs=list(judge.parameters()))
        norms = {"generator": generator, "discriminator": judge} if playing else {"generator": generator}
        for name, network in norms.items():
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            sums[f"{name}/gradient_norm"] = float(torch.nn.utils.get_total_norm(gradients))
        if playing:
            of_judge.step()
        of_generator.step()
        of_generator.zero_grad()
        of_judge.zero_grad()
        found.append(sums)
    return found
