"""Every setting that a message or a page names exists for a job that can show it, and takes the value that is named."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from ldmscale.config import JOBS
from ldmscale.config.folders import config_folder, groups, options
from ldmscale.config.overrides import members, text_settings, typed_settings

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = CHECKOUT / "ldmscale"
SECTIONS = sorted({field.name for job in JOBS.values() for field in fields(job)}, key=len, reverse=True)
KEY = re.compile(
    rf"(?<![\w./$<>-])((?:{'|'.join(SECTIONS)})(?:\.[a-z_]+[a-z0-9_]*)+)(?![\w/(*])(?:=('?)([a-z0-9_.]+)\2(?=[\s,;:)\"'`]|$))?"
)
CHOICE = re.compile(r"(?<![\w./$<>-])([a-z_]+)='?([a-z0-9_]+)'?(?=[\s,;:)\"`]|$)")
FILES = r"(json|yaml|npy|npz|png|txt|model|py|html|jsonl|sbatch|tar|safetensors|ckpt|log|pth|md|sh|toml|bin|jpg|cls|out|pkl)$"
# Messages of these modules belong to some jobs only; any other is of a job that has the setting.
OF_JOBS = {
    "setup/quickstart": [
        "quickstart",
        "autoencoder",
        "latents",
        "diffusion",
        "sample",
    ],  # and commands for its parts
    "data/sources": ["quickstart"],
    "setup/latents": ["latents"],
    "setup/diffusion": ["diffusion"],
    "setup/autoencoder": ["autoencoder"],
    "stages/diffusion": ["diffusion"],
    "stages/autoencoder": ["autoencoder"],
    "interop": ["import", "export", "sample", "diffusion", "autoencoder", "latents", "evaluate"],
    "config/checks/autoencoder": ["autoencoder", "evaluate", "diffusion"],
    "train": ["autoencoder", "diffusion"],
    "cluster": [*JOBS],
}
KEYS = {job: typed_settings(job) for job in JOBS}
# Sections may be named without a setting of theirs, and a mapping's settings are the user's.
PARTS = {
    job: {key[:place] for key in keys for place in (match.start() for match in re.finditer(r"\.|$", key))}
    for job, keys in KEYS.items()
}
OPEN = ("cluster.environment.", "data.storage.options.", "hydra.", "doctor.storage.options.")
# Attributes of the program or columns of a file, which look like settings.
NO_SETTINGS = {"diffusion.spacing.path_of", "parts.layout.encode"}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The string constants of a module, without docstrings; what an f-string puts in is a zero byte."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            skipped |= {id(part) for part in node.values}
            yield node.lineno, "".join(map(str, parts))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def faults(text: str, jobs: list[str]) -> list[str]:
    found = []
    for match in KEY.finditer(text):
        key, value = match[1], match[3]
        if (
            re.search(FILES, key)
            or key in NO_SETTINGS
            or key.startswith(OPEN)
            or text[match.end() : match.end() + 1] == "\0"
        ):
            continue
        owners = [job for job in jobs if key in PARTS[job]]
        if not owners:
            found.append(f"{key} is no setting of {', '.join(jobs)}")
        elif value is not None and not any(takes(job, key, value.rstrip(".")) for job in owners):
            found.append(f"{key} does not take {value}")
    for match in CHOICE.finditer(text):
        group, option = match.groups()
        known = options(group, [config_folder()]) if group in groups([config_folder()]) else None
        if (
            known is not None
            and option != "null"
            and not any(name == option or name.startswith(f"{option}_") for name in known)
        ):
            found.append(f"there is no conf/{group}/{option}.yaml")
    return found


def takes(job: str, key: str, value: str) -> bool:
    kinds = members(KEYS[job][key]) if key in KEYS[job] else []
    literals = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if (
        value in literals
        or (value == "null" and type(None) in kinds)
        or key in text_settings(job)
        or not kinds
    ):
        return True
    if value in ("true", "false"):
        return bool in kinds
    if re.fullmatch(r"[0-9.]+(e[0-9]+)?", value):
        return int in kinds or float in kinds
    return (value in ("n", "x") or not value.strip(".")) and not literals  # a placeholder


def jobs_of(path: Path) -> list[str]:
    name = path.relative_to(PACKAGE).as_posix()
    return next((jobs for prefix, jobs in OF_JOBS.items() if name.startswith(prefix)), [*JOBS])


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_a_message_names_settings_that_its_jobs_have(path):
    found = [f"line {line}: {fault}" for line, text in texts(path) for fault in faults(text, jobs_of(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "path", [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_a_page_names_settings_that_a_job_has(path):
    text = path.read_text(encoding="utf-8")
    found = [fault for code in re.findall(r"`([^`\n]+)`", text) for fault in faults(code, [*JOBS])]
    assert not found, "\n".join(found)


def test_a_wrong_name_and_a_wrong_value_are_found():
    assert faults("give data.max_pixel=3", [*JOBS]) and faults("raise data.max_pixels", ["quickstart"])
    assert faults("give data.crop=centre", [*JOBS]) and faults("give unet=nonsense,", [*JOBS])
    assert not faults("give data.crop=center, unet=text2img_1p45b or zero=3", [*JOBS])
