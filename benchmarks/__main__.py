"""`make bench ARGS=...` or `python -m benchmarks [NAME ...]`: prints tables of ratios to other implementations."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.contenders import Contender
from benchmarks.contest import Row, contest

HEADS = (8, 2)  # head sizes 8 to 32, and 32 to 128; the published models have 40 to 160


# Benchmarks of another kind: programs of their own, which take --quick.
PROGRAMS = {
    "checkpointing": ["benchmarks.checkpointing"],
    "data_images": ["benchmarks.data_streams", "images"],
    "data_latents": ["benchmarks.data_streams", "latents"],
    "data_resume": ["benchmarks.data_resume"],
    "data_encoding": ["benchmarks.data_encoding"],
}
WITH_PEERS = ("data_images", "data_latents")


def contests(quick: bool) -> dict[str, list[Contender]]:
    """Every benchmark by its name; the first contender is what the others are compared with."""

    def make(who: str, family: str, what: str, **others: object) -> Contender:
        return Contender(who, family, what, quick=quick, **others)  # type: ignore[arg-type]

    found: dict[str, list[Contender]] = {}
    for heads in HEADS:
        found[f"unet_backward_{heads}"] = [
            make(who, "unet", "backward", heads=heads) for who in ("diffusers", "ours", "compvis")
        ]
        found[f"unet_checkpointed_{heads}"] = [
            make("diffusers", "unet", "backward", heads=heads, checkpointing="full"),
            make("ours", "unet", "backward", heads=heads, checkpointing="selective"),
            make("ours", "unet", "backward", heads=heads, checkpointing="full"),
            make("compvis", "unet", "backward", heads=heads, checkpointing="full"),
        ]
        found[f"unet_step_{heads}"] = [
            make("diffusers", "unet", "step", heads=heads, stack="fused"),
            make("ours", "unet", "step", heads=heads),
            make("diffusers", "unet", "step", heads=heads, stack="default"),
            make("compvis", "unet", "step", heads=heads),
        ]
    found["unet_step_zero"] = [
        make("diffusers", "unet", "step", stack="fused"),
        *(make("ours", "unet", "step", zero=stage) for stage in (0, 1, 2, 3)),
    ]
    for what in ("backward", "step"):
        found[f"autoencoder_{what}"] = [
            make("diffusers", "autoencoder", what),
            make("ours", "autoencoder", what),
            make("diffusers", "autoencoder", what, channels_last=True),
            make("compvis", "autoencoder", what),
        ]
    found["text_step"] = [
        make("diffusers", "text", "step", heads=2, stack="fused"),
        make("ours", "text", "step", heads=2),
        make("diffusers", "text", "step", heads=2, stack="default"),
    ]
    return found


def table(name: str, rows: Sequence[Row], threads: int) -> str:
    """Markdown: what the documentation holds is what this printed."""
    lines = [
        f"### {name}: {rows[0].rounds} rounds, {threads} threads",
        "",
        "| | median s | fastest s | CPU s | paired | min | CPU | step MiB | held MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r.name} | {r.seconds:.3f} | {r.fastest:.3f} | {r.cpu_seconds:.3f} "
            f"| {r.paired:.2f} | {r.minimum:.2f} | {r.cpu:.2f} | {r.step_mib:.0f} | {r.held_mib:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    known = [*contests(quick=False), *PROGRAMS]
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or several of: {', '.join(known)}")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="no round of a table begins after so many in rounds"
    )
    parser.add_argument("--rounds", type=int, default=40, help="at most so many rounds a table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--keep-memory", action="store_true", help="give all contenders our allocator's settings"
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="as root on a shared machine: rounds in bursts of real-time priority",
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks, two rounds: do the tables work?")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="data_images, data_latents: install peers in environments of their own",
    )
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.names if name not in known]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(known)}")
    for name in chosen.names or known:
        if name in PROGRAMS:
            print(f"### {name}\n", flush=True)
            flags = ["--quick"] if chosen.quick else []
            flags += ["--peers"] if chosen.peers and name in WITH_PEERS else []
            subprocess.run([sys.executable, "-m", *PROGRAMS[name], *flags], check=True)
            print(flush=True)
            continue
        rows = contest(
            contests(chosen.quick)[name],
            threads=chosen.threads,
            seconds=chosen.seconds,
            rounds=2 if chosen.quick else chosen.rounds,
            keep_memory=chosen.keep_memory,
            alone=chosen.alone,
        )
        print(table(name, rows, chosen.threads), flush=True)


if __name__ == "__main__":
    main()
