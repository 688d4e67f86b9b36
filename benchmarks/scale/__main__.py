"""`python -m benchmarks.scale WHAT`: prints what grows with ranks, shards and samples, as a table, and writes JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", type=Path, help="write the rows to this file")
    kinds = parser.add_subparsers(dest="what", required=True)

    def kind(name: str, text: str) -> argparse.ArgumentParser:
        return kinds.add_parser(name, help=text, description=text, parents=[shared])

    manifest = kind(
        "manifest", "A checkpoint's manifest, by N ranks: size, and time to write and to read it."
    )
    manifest.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256])
    manifest.add_argument("--zero", type=int, nargs="+", choices=(0, 1, 2, 3), default=[3])
    manifest.add_argument("--small", action="store_true", help="a small network in place of the 1.45B model")
    manifest.add_argument("--keep", type=Path, help="keep the last manifest in this file")
    index = kind("index", "The index of S local shards: making it, and the file calls of a start.")
    index.add_argument("--shards", type=int, nargs="+", default=[100, 1000])
    index.add_argument("--samples", type=int, default=2, help="per shard")
    order = kind("order", "The order of samples: time per batch, memory, coverage.")
    order.add_argument("--shards", type=int, nargs="+", default=[41_455])
    order.add_argument("--block", type=int, nargs="+", default=[16], help="data.shuffle_block_shards")
    order.add_argument("--ranks", type=int, default=1024)
    exchange = kind(
        "exchange", "N real gloo ranks here: descriptors, store, time of the exchanges of a step."
    )
    exchange.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    exchange.add_argument("--lazy", action="store_true", help="with TORCH_GLOO_LAZY_INIT=1")
    requests = kind("requests", "Requests to a local S3 server: index, start, reads.")
    requests.add_argument("--shards", type=int, default=20)
    requests.add_argument("--reads", type=int, default=50)
    latents = kind("latents", "Requests of the latents job to a local S3 server.")
    latents.add_argument("--finished", type=int, default=10)
    latents.add_argument("--held", type=int, default=5)
    return parser.parse_args(given)


def rows(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """What was asked for, one dictionary per measurement."""
    if chosen.what == "manifest":
        from benchmarks.pretended_cuda.experiment import SMALL
        from benchmarks.scale import manifest

        tensors = manifest.shapes(SMALL if chosen.small else ())
        return [
            asdict(manifest.measure(stage, ranks, tensors, keep=chosen.keep))
            for stage in chosen.zero
            for ranks in chosen.ranks
        ]
    if chosen.what == "index":
        from benchmarks.scale import index

        return [asdict(index.measure(shards, chosen.samples)) for shards in chosen.shards]
    if chosen.what == "order":
        from benchmarks.scale import order

        return [
            asdict(order.measure(shards, block_shards=block, ranks=chosen.ranks))
            for shards in chosen.shards
            for block in chosen.block
        ]
    if chosen.what == "exchange":
        from benchmarks.scale import exchange

        return [asdict(exchange.measure(ranks, lazy=chosen.lazy)) for ranks in chosen.ranks]
    from benchmarks.scale import requests

    if chosen.what == "requests":
        found = requests.measure_shards(chosen.shards, chosen.reads)
    else:
        found = requests.measure_latents(chosen.finished, chosen.held)
    return [{"what": one.what, "total": one.total, "requests": one.requests} for one in found]


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: one column per measurement."""
    lines = ["| | " + " | ".join(str(number + 1) for number in range(len(found))) + " |"]
    lines.append("|---|" + "---:|" * len(found))
    for key in found[0]:
        lines.append(f"| {key} | " + " | ".join(_cell(row[key]) for row in found) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def main(given: Sequence[str] | None = None) -> None:
    chosen = arguments(given)
    found = rows(chosen)
    print(table(found))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
