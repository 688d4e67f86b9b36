"""The exact sets of packages: what is pinned for GPUs is what is tested on CPUs, with a torch and an xformers that fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
GPU_ONLY = re.compile(r"torch|triton|xformers|nvidia-|cuda-")


def pins(name: str) -> dict[str, set[str]]:
    """Pinned versions of each package, with their markers."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "constraints" / name).read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), set()).add(
                f"{pin.specifier} {pin.marker or ''}".strip()
            )
    return found


def test_gpus_take_the_versions_of_cpus_but_for_torch_and_what_comes_with_it() -> None:
    cpu, gpu = pins("cpu.txt"), pins("gpu.txt")
    assert {name for name in cpu if cpu[name] != gpu.get(name)} == {"torch"}
    assert all(GPU_ONLY.match(name) for name in set(gpu) - set(cpu)), set(gpu) - set(cpu)


def test_xformers_and_torch_are_pinned_as_a_pair() -> None:
    gpu = pins("gpu.txt")
    # The wheel of xformers 0.0.35 is built for torch 2.10.0 with CUDA 12.8.
    assert gpu["torch"] == {"==2.10.0"} and gpu["xformers"] == {"==0.0.35"}
    assert gpu["nvidia-cuda-runtime-cu12"] == {"==12.8.90"}
    text = (ROOT / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^gpu = \[(.*)\]$", text, re.MULTILINE)
    wanted = {r.name: r.specifier for r in map(Requirement, re.findall(r'"([^"]+)"', extra))}
    assert wanted["torch"].contains("2.10.0") and not wanted["torch"].contains("2.11.0")
    assert wanted["xformers"].contains("0.0.35") and not wanted["xformers"].contains("0.0.36")


@pytest.mark.parametrize("name", ["cpu.txt", "gpu.txt"])
def test_every_dependency_is_pinned_within_its_bounds(name: str) -> None:
    pinned = pins(name)
    text = (ROOT / "pyproject.toml").read_text()
    (block,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    wanted = [Requirement(found) for found in re.findall(r'"([^"]+)"', block)]
    assert len(wanted) >= 17
    for requirement in wanted:
        for pin in pinned[canonicalize_name(requirement.name)]:
            version = pin.split()[0].removeprefix("==")
            assert requirement.specifier.contains(version), f"{requirement} against {pin}"
