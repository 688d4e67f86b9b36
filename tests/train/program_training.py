"""Run by torchrun: trains the toy at every ZeRO stage and precision beside plain torch, and writes what came out.

Argument: the file for rank 0's results.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from toy import Block, RealAndFake, Toy, batch

from ldmscale.checkpoint.folders import Retention, complete_checkpoints
from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.checkpoint.shards import Reader
from ldmscale.inference.averages import chosen_weights
from ldmscale.train.engine.ema import PowerEma, ShardedEma
from ldmscale.train.engine.engine import Engine, sharded_construction
from ldmscale.train.engine.options import EngineOptions
from ldmscale.train.engine.process import connect, disconnect
from ldmscale.train.snapshot import snapshot, snapshot_averages

DEVICE = torch.device("cpu")
STEPS, GLOBAL_BATCH, ACCUMULATION, CLIP, RATE, DECAY = 10, 12, 2, 0.3, 1e-2, 0.9
TRACKED = (0.1, 0.2)  # relative widths of power-function averages
# sigma_rel^2 = (g+1) / ((g+2)^2 (g+3)), solved by hand for two tracked widths and one that is made of them
EXPONENTS = {0.1: 6.937203937601809, 0.2: 1.8262137798958404, 0.15: 3.5578687748994646}
SETTINGS = {  # name -> stage, persistence threshold, overlapped communication, modules gathered as a whole
    "zero0": (0, 0, False),
    "zero1": (1, 0, False),
    "zero2": (2, 0, True),
    "zero3": (3, 0, True),
    "zero3_persistent": (3, 100_000, False),
    "zero3_leaf": (3, 0, True, (Block,)),
}


def options(
    stage: int,
    precision: str,
    threshold: int,
    overlap: bool,
    leaf_types: tuple[type[nn.Module], ...] = (),
    **others: Any,
) -> EngineOptions:
    return EngineOptions(
        zero_stage=stage,
        precision=precision,
        rank_micro_batch=GLOBAL_BATCH // dist.get_world_size() // ACCUMULATION,
        accumulation_steps=ACCUMULATION,
        gradient_clip_norm=CLIP,
        learning_rate=RATE,
        persistence_threshold=threshold,
        overlap_communication=overlap,
        leaf_types=leaf_types,
        **others,
    )


def micro_batches(step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """This rank's share of a global batch that is the same for any number of ranks."""
    share = GLOBAL_BATCH // dist.get_world_size()
    size = share // ACCUMULATION
    first = step * GLOBAL_BATCH + dist.get_rank() * share
    return [batch(first + number * size, size) for number in range(ACCUMULATION)]


def mean(value: float) -> float:
    box = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(box)
    return box.item() / dist.get_world_size()


def distance(one: Tensor, other: Tensor) -> float:
    return (one.float() - other.float()).abs().max().item()


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def plain() -> dict[str, Any]:
    """The same training by plain torch on the whole batch, with LitEma's formula written out."""
    torch.manual_seed(0)
    network = Toy()
    optimizer = torch.optim.AdamW(trained(network), lr=RATE, weight_decay=0.01)
    shadow = [parameter.detach().clone() for parameter in network.parameters()]
    losses, norms, trajectory = [], [], []
    for step in range(STEPS):
        x, t, y = batch(step * GLOBAL_BATCH, GLOBAL_BATCH)
        optimizer.zero_grad()
        loss = F.mse_loss(network(x, t), y)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained(network), CLIP)))
        optimizer.step()
        losses.append(loss.item())
        trajectory.append({name: p.detach().double() for name, p in network.named_parameters()})
        decay = min(DECAY, (1 + step + 1) / (10 + step + 1))
        for average, parameter in zip(shadow, network.parameters(), strict=True):
            average.sub_((1 - decay) * (average - parameter.detach()))
    x, t, _ = batch(10**6, 3)
    with torch.no_grad():
        raw = network.eval()(x, t)
        for average, parameter in zip(shadow, network.parameters(), strict=True):
            parameter.copy_(average)
        averaged = network(x, t)
    power = {width: by_power(trajectory, gamma) for width, gamma in EXPONENTS.items()}
    return {"losses": losses, "norms": norms, "raw": raw, "averaged": averaged, "power": power}


def by_power(trajectory: list[dict[str, Tensor]], gamma: float) -> dict[str, Tensor]:
    """The power-function average of a whole trajectory, with the profile's weights written out."""
    last = len(trajectory)
    weights = [(k ** (gamma + 1) - (k - 1) ** (gamma + 1)) / last ** (gamma + 1) for k in range(1, last + 1)]
    return {
        name: sum(w * at[name] for w, at in zip(weights, trajectory, strict=True)) for name in trajectory[0]
    }


def sharded(name: str, precision: str, reference: dict[str, Any]) -> dict[str, Any]:
    chosen = options(SETTINGS[name][0], precision, *SETTINGS[name][1:])
    torch.manual_seed(0)
    with sharded_construction(chosen):
        network = Toy()
    engine = Engine("denoiser", network, chosen, DEVICE)
    ema = ShardedEma(engine.masters, DECAY)
    dtype = engine.compute_dtype
    losses, norms, updated = [], [], []
    x, t, _ = (column.to(dtype) for column in batch(10**6, 3))
    with engine.rehearsal():  # must leave nothing behind
        micro = micro_batches(99)[0]
        engine.backward(F.mse_loss(engine(micro[0].to(dtype), micro[1].to(dtype)).float(), micro[2]))
    for step in range(STEPS):
        total = 0.0
        for x_i, t_i, y_i in micro_batches(step):
            loss = F.mse_loss(engine(x_i.to(dtype), t_i.to(dtype)).float(), y_i)
            engine.backward(loss)
            updated.append(engine.step())
            total += loss.item() / ACCUMULATION
        ema.update()
        losses.append(mean(total))
        norms.append(engine.gradient_norm())
        if step == STEPS // 2:  # a look at the average in the middle must not change the training
            with torch.no_grad(), engine.averaged_weights(ema):
                engine.network.eval()(x, t)
                engine.network.train()
    engine.network.eval()
    with torch.no_grad():
        raw = engine(x, t)
        with engine.averaged_weights(ema):
            averaged = engine(x, t)
            by_module = engine.network(x, t)
            refused = refuses(engine.step) and refuses(lambda: engine.refuse_averaged("save"))
        again = engine(x, t)
    held = sum(fragment.numel for fragment in engine.fragments())
    others = torch.tensor(float(held))
    dist.all_reduce(others)
    return {
        "losses": losses,
        "norms": norms,
        "updated": updated,
        "raw_error": distance(raw, reference["raw"]),
        "averaged_error": distance(averaged, reference["averaged"]),
        "averaged_differs_by": distance(raw, averaged),
        "module_equals_engine": torch.equal(averaged, by_module),
        "raw_again": torch.equal(raw, again),
        "refused_inside": refused,
        "parameters": engine.parameter_count(),
        "held_here": held,
        "held_by_all": int(others.item()),
        "master_dtypes": sorted({str(master.dtype) for master in engine.masters}),
        "calls": int(engine.network.calls),
        "updates": engine.updates,
        "gathered_whole": sum(hasattr(m, "_z3_leaf") and m._z3_leaf for m in network.modules()),
    }


def power_averages(name: str, reference: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Two power-function averages on shards, stored every other update; a third one made of them afterwards."""
    chosen = options(SETTINGS[name][0], "fp32", *SETTINGS[name][1:])
    torch.manual_seed(0)
    with sharded_construction(chosen):
        network = Toy()
    engine = Engine("denoiser", network, chosen, DEVICE)
    averages = {"denoiser": [PowerEma(engine.masters, width) for width in TRACKED]}
    stored = CheckpointManager(folder / "averages", retention=Retention(keep_last=100))
    for step in range(STEPS):
        for x, t, y in micro_batches(step):
            engine.backward(F.mse_loss(engine(x, t), y))
            engine.step()
        for average in averages["denoiser"]:
            average.update()
        if step % 2 == 0:
            stored.save(step + 1, *snapshot_averages({"denoiser": engine}, averages))
    pieces, state = snapshot({"denoiser": engine}, averages)
    reader = Reader(CheckpointManager(folder / "checkpoints").save(STEPS, pieces, state))
    found: dict[str, Any] = {"stored": len(complete_checkpoints(folder / "averages"))}
    for width, expected in reference["power"].items():
        weights = chosen_weights(reader, "denoiser", f"power_{width}")
        found[f"error_{width}"] = far(weights, expected)
    found["between_tracked"] = far(reference["power"][TRACKED[0]], reference["power"][TRACKED[1]])
    return found


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of the trained weights."""
    names = [name for name in other if not name.startswith("fixed")]
    return math.sqrt(sum(float((one[name].double() - other[name]).square().sum()) for name in names))


def refuses(action: Any) -> bool:
    try:
        action()
    except RuntimeError:
        return True
    return False


def not_finite(name: str, precision: str) -> dict[str, Any]:
    """Windows with an infinite loss of finite gradient on one rank only, and one to be discarded, among good ones."""
    chosen = options(SETTINGS[name][0], precision, *SETTINGS[name][1:])
    torch.manual_seed(0)
    with sharded_construction(chosen):
        network = Toy()
    engine = Engine("denoiser", network, chosen, DEVICE)
    seen, norms, masters = [], [], []
    for step in range(4):
        for number, (x, t, y) in enumerate(micro_batches(step)):
            loss = F.mse_loss(engine(x.to(engine.compute_dtype), t.to(engine.compute_dtype)).float(), y)
            if step == 1 and number == 1 and dist.get_rank() == dist.get_world_size() - 1:
                loss = loss + math.inf
            engine.backward(loss)
            seen.append(engine.step(discard=step == 2 and number == 1))
        norms.append(engine.gradient_norm())
        masters.append([master.detach().clone() for master in engine.masters])
    kept = all(torch.equal(a, b) for a, b in zip(masters[0], masters[1], strict=True))
    kept &= all(torch.equal(a, b) for a, b in zip(masters[1], masters[2], strict=True))
    moved = not all(torch.equal(a, b) for a, b in zip(masters[2], masters[3], strict=True))
    finite = all(torch.isfinite(f.of(engine.masters[f.flat])).all() for f in engine.fragments())
    return {
        "updated": seen,
        "kept": kept,
        "moved": moved,
        "finite": finite,
        "norms": norms,
        "counts": [engine.updates, engine.skipped_updates],
    }


def statistics(name: str) -> dict[str, Any]:
    """Running statistics of a batch norm that sees another batch on each rank."""
    chosen = options(SETTINGS[name][0], "fp32", *SETTINGS[name][1:])
    torch.manual_seed(0)
    with sharded_construction(chosen):
        network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    engine = Engine("normed", network, chosen, DEVICE)
    own = nn.BatchNorm2d(3)
    for x, _, y in micro_batches(0):
        engine.backward(F.mse_loss(engine(x), y))
        own(x)
        engine.step()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [buffer.tolist() for _, buffer in engine.buffers()])
    return {"of_ranks": gathered, "of_rank_0": [buffer.tolist() for buffer in own.buffers()]}


def adversarial_plain() -> dict[str, list[float]]:
    """Two networks against each other in plain torch, with the published adaptive weight on the whole batch."""
    torch.manual_seed(0)
    generator, judge = Toy(), RealAndFake()
    optimizers = [
        torch.optim.AdamW(trained(network), lr=RATE, weight_decay=0.01) for network in (generator, judge)
    ]
    logged: dict[str, list[float]] = {"weight": [], "generator": [], "judge": [], "norm_g": [], "norm_d": []}
    for step in range(STEPS):
        x, t, y = batch(step * GLOBAL_BATCH, GLOBAL_BATCH)
        size = GLOBAL_BATCH // ACCUMULATION
        for optimizer in optimizers:
            optimizer.zero_grad()
        weights, losses_g, losses_d = [], [], []
        for number in range(ACCUMULATION):
            # The micro-batch of plain torch is the union of all ranks' micro-batches of that number.
            picked = columns(number, size)
            out = generator(x[picked], t[picked])
            fit = F.l1_loss(out, y[picked])
            fake = -judge.judge(out).mean()
            last = generator.outlet.weight
            (g_fit,) = torch.autograd.grad(fit, last, retain_graph=True)
            (g_fake,) = torch.autograd.grad(fake, last, retain_graph=True)
            weight = (g_fit.norm() / (g_fake.norm() + 1e-4)).clamp(0, 1e4).detach()
            judge.requires_grad_(False)
            ((fit + weight * fake) / ACCUMULATION).backward()
            judge.requires_grad_(True)
            real, made = judge(y[picked], out.detach())
            loss = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
            (loss / ACCUMULATION).backward()
            weights.append(weight.item())
            losses_g.append(fit.item())
            losses_d.append(loss.item())
        for network, optimizer, key in zip((generator, judge), optimizers, ("norm_g", "norm_d"), strict=True):
            logged[key].append(float(nn.utils.clip_grad_norm_(trained(network), CLIP)))
            optimizer.step()
        logged["weight"] += weights
        logged["generator"].append(sum(losses_g) / ACCUMULATION)
        logged["judge"].append(sum(losses_d) / ACCUMULATION)
    return logged


def columns(number: int, size: int) -> list[int]:
    """Places in the global batch of what all ranks take as their micro-batch `number`."""
    world = dist.get_world_size()
    share = GLOBAL_BATCH // world
    return [rank * share + number * size // world + i for rank in range(world) for i in range(size // world)]


def adversarial_sharded(name: str) -> dict[str, list[float]]:
    """The same by two engines: the graph is cut at the output, and the judge judges as a frozen module."""
    chosen = options(SETTINGS[name][0], "fp32", *SETTINGS[name][1:])
    torch.manual_seed(0)
    with sharded_construction(chosen):
        generator_network, judge_network = Toy(), RealAndFake()
    generator = Engine("generator", generator_network, chosen, DEVICE)
    discriminator = Engine("discriminator", judge_network, chosen, DEVICE)
    kept: list[Tensor] = []
    generator_network.outlet.register_forward_hook(lambda _, inputs, __: kept.append(inputs[0].detach()))
    logged: dict[str, list[float]] = {"weight": [], "generator": [], "judge": [], "norm_g": [], "norm_d": []}
    for step in range(STEPS):
        losses_g, losses_d = [], []
        for x, t, y in micro_batches(step):
            kept.clear()
            out = generator(x, t)
            cut = out.detach().requires_grad_(True)
            fit = F.l1_loss(cut, y)
            (d_fit,) = torch.autograd.grad(fit, cut)
            judge_network.requires_grad_(False)
            (d_fake,) = torch.autograd.grad(-judge_network.judge(cut).mean(), cut)
            judge_network.requires_grad_(True)
            weight = norm_of_last(kept[0], d_fit) / (norm_of_last(kept[0], d_fake) + 1e-4)
            weight = weight.clamp(0, 1e4)
            generator.backward((out * (d_fit + weight * d_fake)).sum())
            generator.step()
            real, made = discriminator(y, cut.detach())
            loss = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
            discriminator.backward(loss)
            discriminator.step()
            logged["weight"].append(weight.item())
            losses_g.append(fit.item())
            losses_d.append(loss.item())
        logged["generator"].append(mean(sum(losses_g) / ACCUMULATION))
        logged["judge"].append(mean(sum(losses_d) / ACCUMULATION))
        logged["norm_g"].append(generator.gradient_norm())
        logged["norm_d"].append(discriminator.gradient_norm())
    return logged


def norm_of_last(inputs: Tensor, direction: Tensor) -> Tensor:
    """Norm over all ranks of the gradient of the generator's last weight, a 1x1 convolution."""
    gradient = torch.nn.grad.conv2d_weight(inputs, (3, 10, 1, 1), direction)
    dist.all_reduce(gradient)
    return (gradient / dist.get_world_size()).norm()


def main() -> None:
    warnings.simplefilter("error", FutureWarning)  # connect() must have silenced those of DeepSpeed
    connect(DEVICE)
    reference = plain()
    found: dict[str, Any] = {"plain": {key: reference[key] for key in ("losses", "norms")}}
    found["plain"]["averaged_differs_by"] = distance(reference["raw"], reference["averaged"])
    alone = dist.get_world_size() == 1
    for precision in ("fp32", "bf16"):
        for name in ("zero0", "zero3") if alone else SETTINGS:
            found[f"{name}_{precision}"] = sharded(name, precision, reference)
    folder = Path(sys.argv[1]).parent / f"averages_on_{dist.get_world_size()}"
    for name in ("zero3",) if alone else ("zero3", "zero1"):
        found[f"power_{name}"] = power_averages(name, reference, folder / name)
    if not alone:
        for name, precision in (("zero0", "fp32"), ("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "bf16")):
            found[f"not_finite_{name}_{precision}"] = not_finite(name, precision)
        found["statistics"] = statistics("zero3")
        found["adversarial_plain"] = adversarial_plain()
        for name in SETTINGS:
            found[f"adversarial_{name}"] = adversarial_sharded(name)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    disconnect()


main()
