"""The folders that configuration files are read from: conf/ of this package, and those of --config-dir."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ldmscale.errors import ConfigError

SEARCH_PATH = "hydra.searchpath"


def config_folder() -> Path:
    """conf/ inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def search_override(folder: str) -> str:
    """The override that makes Hydra search `folder`, too. Raises ConfigError where it is no folder."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"--config-dir {folder}: expected a folder with experiment/NAME.yaml and the like in it"
        )
    text = str(path.absolute()).replace("'", "\\'")
    return f"{SEARCH_PATH}=['{text}']"


def config_folders(words: Iterable[str]) -> list[Path]:
    """conf/ and the local folders that overrides of hydra.searchpath among `words` name, in the order of the search."""
    found = [config_folder()]
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key == SEARCH_PATH:
            found += [Path(path) for path in map(_local, _listed(value)) if path]
    return found


def groups(folders: Iterable[Path]) -> list[str]:
    """The names of all groups of options."""
    return sorted(
        {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    )


def options(group: str, folders: Iterable[Path]) -> list[str]:
    """The options of a group, by the names of their files."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def groups_of(job: str) -> list[str]:
    """The groups that conf/<job>.yaml chooses from."""
    entries = _defaults(config_folder() / f"{job}.yaml")
    return [group for entry in entries if isinstance(entry, dict) for group in entry]


def sections_of(experiment: str, folders: Iterable[Path]) -> set[str]:
    """The sections and groups that an experiment sets, with those of the experiments that it extends."""
    found: set[str] = set()
    for path in [folder / "experiment" / f"{experiment}.yaml" for folder in folders]:
        if not path.is_file():
            continue
        found |= {str(key) for key in _read(path) if key not in ("defaults", "hydra")}
        for entry in _defaults(path):
            if isinstance(entry, dict):
                names = [str(key).split("@")[0].split()[-1].lstrip("/") for key in entry]
                found |= {name for name in names if not name.startswith("hydra")}
            elif isinstance(entry, str) and entry not in ("_self_", experiment):
                found |= sections_of(entry, folders)
        break  # the first of the search path
    return found


def _defaults(path: Path) -> list[Any]:
    found = _read(path).get("defaults")
    return found if isinstance(found, list) else []


def _read(path: Path) -> dict[Any, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be a configuration: give another file") from None
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # Hydra reports it
    return found if isinstance(found, dict) else {}


def _listed(value: str) -> list[str]:
    try:
        found = _parser().parse_override(f"x={value}").value()
    except HydraException:
        return []  # Hydra reports it
    return [str(part) for part in found] if isinstance(found, list) else []


def _local(path: str) -> str | None:
    scheme, separator, rest = path.partition("://")
    if not separator:
        return path
    return rest if scheme == "file" else None


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()
