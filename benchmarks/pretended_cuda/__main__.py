"""`python -m benchmarks.pretended_cuda WHAT`: prints what a step would do on a GPU, as a table, and writes JSON.

unet, autoencoder          our network and that of diffusers: kernels, bytes, memory, roofline; status 1 above the limits
diffusion-step, autoencoder-step    one step of the stage: waits, copies, kernels, collectives
samplers                   the same for every sampler
zero STAGE                 collectives and host time behind DeepSpeed, by CPU tensors
deepspeed STAGE            waits, collectives and streams behind DeepSpeed's CUDA accelerator
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.pretended_cuda.device import Unsupported, pretend

if TYPE_CHECKING:  # everything that imports torch is imported after `pretend`
    from benchmarks.pretended_cuda.counters import Totals

STATUS_UNSUPPORTED = 3
NETWORKS = {"unet": (64, 32), "autoencoder": (8, 256)}  # batch and side
STEPS = {
    "diffusion-step": ("diffusion", 17),
    "autoencoder-step": ("autoencoder", 12),
    "samplers": ("samplers", 2),
}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretended_cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=[*NETWORKS, *STEPS, "zero", "deepspeed"])
    parser.add_argument("stage", nargs="?", type=int, choices=(0, 1, 2, 3), help="of ZeRO")
    parser.add_argument("--batch", type=int, help="samples per rank")
    parser.add_argument("--side", type=int, help="of latents, or of images for an autoencoder")
    parser.add_argument("--ranks", type=int, default=8, help="pretended ranks (default: 8)")
    parser.add_argument("--checkpointing", choices=("off", "selective", "full"), default="off")
    parser.add_argument("--leaf-blocks", action="store_true", help="zero.leaf_blocks=true, at ZeRO-3")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of a step")
    parser.add_argument("--small", action="store_true", help="a narrow network: seconds instead of minutes")
    parser.add_argument("--top", type=int, default=10, help="operators in the list of kernels")
    parser.add_argument("--json", type=Path, help="write everything that was counted to this file")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of our configuration"
    )
    chosen = parser.parse_args(given)
    if chosen.what in ("zero", "deepspeed") and not chosen.stage:
        parser.error(f"{chosen.what} needs a stage of ZeRO: 1, 2 or 3")
    return chosen


def main(given: Sequence[str] | None = None) -> int:
    chosen = arguments(given)
    if chosen.what != "zero":
        try:
            pretend()
        except Unsupported as reason:
            print(f"unsupported: {reason}", file=sys.stderr)
            return STATUS_UNSUPPORTED
    if chosen.what in NETWORKS:
        found = of_networks(chosen)
    elif chosen.what in STEPS:
        found = of_step(chosen)
    else:
        found = of_zero(chosen) if chosen.what == "zero" else of_deepspeed(chosen)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    for line in found.get("above", ()):
        print(line, file=sys.stderr)
    return 1 if found.get("above") else 0


def of_networks(chosen: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.pretended_cuda import networks

    batch, side = NETWORKS[chosen.what]
    compare = networks.compare_unets if chosen.what == "unet" else networks.compare_autoencoders
    measured = compare(chosen.batch or batch, chosen.side or side, chosen.set, small=chosen.small)
    ratios = networks.ratios(measured)
    print("| | parameters | kernels | GiB moved | peak GiB | roofline ms | memory-bound ms | waits |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for m in measured:
        print(
            f"| {m.name} | {m.parameters:,} | {_row(m.totals)} | {m.totals.memory_bound_ms:.1f} | {m.waits} |"
        )
    print(f"| ratio | | {' | '.join(f'{ratios[key]:.3f}' for key in networks.RATIOS)} | | |\n")
    for m in measured:
        print(
            f"{m.name}: {_kernels(m.totals, chosen.top)}; inputs of convolutions: {m.totals.convolution_inputs}"
        )
    default = not (chosen.small or chosen.batch or chosen.side or chosen.set)
    above = networks.above_limits(chosen.what, ratios) if default else []
    return {
        "ratios": ratios,
        "above": above,
        "networks": {m.name: asdict(m) | {"waits": m.waits} for m in measured},
    }


def of_step(chosen: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.pretended_cuda import stages
    from benchmarks.pretended_cuda.counters import KINDS

    what, batch = STEPS[chosen.what]
    phases = stages.measure(
        what,
        chosen.batch or batch,
        ranks=chosen.ranks,
        side=chosen.side,
        overrides=chosen.set,
        checkpointing=chosen.checkpointing,
        precision=chosen.precision,
        small=chosen.small,
    )
    print(f"| | kernels | GiB moved | peak GiB | roofline ms | {' | '.join(KINDS)} | collectives |")
    print(f"|---|{'---:|' * (5 + len(KINDS))}")
    for phase in phases:
        notes = " | ".join(str(phase.totals.notes[kind]) for kind in KINDS)
        print(f"| {phase.name} | {_row(phase.totals)} | {notes} | {sum(phase.collectives.values())} |")
    for phase in phases:
        print(f"\n{phase.name}: {_kernels(phase.totals, chosen.top)}")
        _print_notes(phase.totals, phase.host_tensors)
    return {"phases": [asdict(phase) for phase in phases]}


def of_zero(chosen: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.pretended_cuda import experiment, zero

    narrow = experiment.SMALL if chosen.small else experiment.NARROW
    found = zero.measure(
        chosen.stage,
        ranks=chosen.ranks,
        checkpointing=chosen.checkpointing,
        leaf_blocks=chosen.leaf_blocks,
        overrides=[*narrow, *chosen.set],
    )
    print(f"ZeRO-{found.stage} of {found.ranks} ranks, {found.tensors} tensors in {found.modules} modules")
    print("| | calls | times the parameters | host ms |\n|---|---|---|---:|")
    closing = [(f"{p.name} of the last micro-step", p) for p in found.closing]
    for name, p in [(p.name, p) for p in found.passes[:2]] + closing + [("update", found.passes[2])]:
        elements = _pairs({key: f"{value:.2f}" for key, value in p.elements.items()})
        print(f"| {name} | {_pairs(p.calls)} | {elements} | {1e3 * p.seconds:.0f} |")
    return asdict(found)


def of_deepspeed(chosen: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.pretended_cuda import deepspeed_cuda

    found = deepspeed_cuda.measure(
        chosen.stage,
        chosen.batch or 2,
        ranks=chosen.ranks,
        small=chosen.small,
        leaf_blocks=chosen.leaf_blocks,
        checkpointing=chosen.checkpointing,
        overrides=chosen.set,
    )
    print(
        f"ZeRO-{found.stage} of {found.ranks} ranks, {found.parameters:,} parameters; masters: {found.masters}"
    )
    print("| | kernels | GiB moved | peak GiB | roofline ms | waits | collectives | streams |")
    print("|---|---:|---:|---:|---:|---:|---|---|")
    for part in found.parts:
        calls = f"{_pairs(part.collectives)} | {_pairs(part.stream_calls)}"
        print(f"| {part.name} | {_row(part.totals)} | {part.waits} | {calls} |")
    for part in found.parts:
        print(f"\n{part.name}: {_kernels(part.totals, chosen.top)}")
        _print_notes(part.totals, part.host_tensors)
    return asdict(found) | {"parts": [asdict(part) | {"waits": part.waits} for part in found.parts]}


def _row(totals: Totals) -> str:
    return f"{totals.kernels:,} | {totals.gib_moved:.2f} | {totals.peak_gib:.2f} | {totals.roofline_ms:.1f}"


def _kernels(totals: Totals, top: int) -> str:
    return _pairs(dict(list(totals.kernels_of.items())[:top]))


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"


def _print_notes(totals: Totals, host_tensors: Sequence[str]) -> None:
    for note in totals.where:
        print(f"  {note['times']} x {note['kind']}: {note['what']} at {note['where']}")
    for tensor in host_tensors:
        print(f"  a CPU tensor over NCCL: {tensor}")


if __name__ == "__main__":
    sys.exit(main())
