"""Faults of imports and exports that can be seen without opening a tensor."""

from __future__ import annotations

from pathlib import Path

from ldmscale.checks.data import check_folder
from ldmscale.checks.stages import check_model
from ldmscale.config import ExportJob, ImportJob


def check_places(config: ImportJob | ExportJob) -> list[str]:
    """Source there, destination not inside or around it."""
    faults = []
    src, dst = Path(config.src).resolve(), Path(config.dst).resolve()
    if not src.exists():
        faults.append(f"src={config.src}: there is no such file or folder")
    if src == dst or src in dst.parents or dst in src.parents:
        faults.append(f"dst={config.dst} and src={config.src} lie in one another: give a dst elsewhere")
    faults += check_folder("dst", dst.parent)
    return faults


def check_import(config: ImportJob) -> list[str]:
    faults = check_places(config)
    if (Path(config.src) / "run.json").is_file():
        faults.append(f"src={config.src} is a run of ldmscale: sample.model= and export take it as it is")
    if config.config is not None and not Path(config.config).is_file():
        faults.append(f"config={config.config}: there is no such file; give CompVis' yaml of the checkpoint")
    if Path(config.dst).is_file():
        faults.append(f"dst={config.dst} is a file: an imported model is a folder")
    return faults


def check_export(config: ExportJob) -> list[str]:
    faults = check_places(config)
    if not faults:
        faults += check_model(config.src, "src")
    if config.format == "diffusers" and Path(config.dst).suffix in (".ckpt", ".safetensors"):
        faults.append(f"dst={config.dst}: diffusers models are folders; give a folder, or format=compvis")
    return faults
