"""Composes a job's configuration with Hydra, and reports every fault of a command line at once.

Hydra stops at the first override that it cannot place. To report all mistyped keys together, a failed composition is
taken apart: each override is tried alone, and the good ones go on to the typed checks.

To Hydra braces, `=`, `#`, a lone quote and more are syntax, so it refuses `data.shards=/data/{00000..00009}.tar`,
`data.shards=https://host/a.tar?key=1` and `run.dir=runs/a(1)`. A value that it cannot read is quoted here, entry by entry
in lists and mappings. A value that it can read means what Hydra defines.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from ldmscale import redact
from ldmscale.config import JOBS
from ldmscale.config.typed import RETIRED
from ldmscale.errors import ConfigError

_HARMLESS = re.compile(r"[\w./:*+-]*")  # read as they are; spares the parser's time


_ENTRY = re.compile(r"\s*([A-Za-z_]\w*)\s*:(.*)", re.DOTALL)


_OPEN, _CLOSE = "([{", ")]}"


def config_folder() -> Path:
    """conf/ inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def settle_overrides(job: str, overrides: Sequence[str]) -> list[str]:
    """What users write, as Hydra takes it.

    `zero=3`: names of a group's files must be strings. `experiment=smoke`: an experiment that several jobs know under
    one name has a file for each of them, smoke_<job>.yaml. `unet.dropout=0.1`: a key that the typed configuration has
    may be given although the composed files leave it at its default. `data.filter=a > 1`: a condition is text, though
    Hydra has meanings of its own for `>` and brackets. `data.shards={000..999}.tar`: so is any other value of a known
    key that Hydra cannot read (`plain_values`). `text_encoder=null`: Hydra knows a group that is
    not chosen by `~text_encoder` only.
    """

    def quote(match: re.Match[str]) -> str:
        return "zero=" + ",".join(f"'{stage}'" for stage in match[1].split(","))

    def own(match: re.Match[str]) -> str:
        files = config_folder() / "experiment"
        name = match[1]
        return f"experiment={name}_{job}" if (files / f"{name}_{job}.yaml").is_file() else match[0]

    def without(match: re.Match[str]) -> str:
        return f"~{match[1]}" if (config_folder() / match[1]).is_dir() else match[0]

    def plain_text(match: re.Match[str]) -> str:
        text = match[1].replace("\\", "\\\\").replace("'", "\\'")
        return f"data.filter='{text}'"

    overrides = [
        re.sub(r"^data\.filter=(?!(?:null|'[^']*'|\"[^\"]*\")$)(.+)$", plain_text, override)
        for override in overrides
    ]
    settled = [re.sub(r"^zero=([0-9](?:,[0-9])*)$", quote, override) for override in overrides]
    settled = [re.sub(r"^experiment=(\w+)$", own, override) for override in settled]
    settled = [re.sub(r"^(\w+)=null$", without, override) for override in settled]
    known = {*typed_keys(JOBS[job]), *RETIRED}
    settled = [
        plain(override) if override.split("=")[0].lstrip("+") in known else override for override in settled
    ]
    return [
        "++" + override if "." in override.split("=")[0] and override.split("=")[0] in known else override
        for override in settled
    ]


def typed_keys(kind: Any, path: str = "") -> list[str]:
    """Dotted names of all settings of a typed configuration, those of sections that may be null among them."""
    kind = next((part for part in get_args(kind) if is_dataclass(part)), kind)
    if not is_dataclass(kind):
        return [path]
    types = get_type_hints(kind)
    return [
        key for f in fields(kind) for key in typed_keys(types[f.name], f"{path}.{f.name}" if path else f.name)
    ]


def compose_job(job: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose conf/<job>.yaml with `overrides` into plain values.

    Raises ConfigError naming every override that cannot be applied.
    """
    values, faults = compose_valid(job, overrides)
    if faults:
        raise ConfigError(faults)
    return values


def compose_valid(job: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Compose with those overrides that can be applied; the faults of the others."""
    overrides = settle_overrides(job, overrides)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3", job_name=job):
        # Where the whole fails, its overrides are tried one by one, to name each that is to blame.
        with suppress(HydraException, OmegaConfBaseException, ValueError):
            return _composed(job, overrides), []
        good, faults = _sorted_out(job, overrides)
        try:
            return _composed(job, good), faults
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            return {}, [*faults, _first_lines(error)]


def _composed(job: str, overrides: Sequence[str]) -> dict[str, Any]:
    config = compose(config_name=job, overrides=list(overrides))
    with _environment_read() as variables:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    if variables:
        redact.register_environment(OmegaConf.to_container(config, resolve=False), values, variables)
    return cast(dict[str, Any], values)


@contextmanager
def _environment_read() -> Iterator[dict[str, str]]:
    """Collects the environment variables that interpolations read while the block runs."""
    variables: dict[str, str] = {}

    def read(key: str, *default: str | None) -> str | None:
        if key in os.environ:
            variables[key] = os.environ[key]
        return oc.env(key, *default)

    OmegaConf.register_new_resolver("oc.env", read, replace=True)
    try:
        yield variables
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _sorted_out(job: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides that apply beside the accepted choices of groups, and a fault for each of the others."""
    keys = sorted({*_dotted(_composed(job, [])), *typed_keys(JOBS[job])})
    groups = sorted(p.name for p in config_folder().iterdir() if p.is_dir())
    # Choices of groups first: an experiment brings the keys that later overrides change.
    ordered = sorted(overrides, key=lambda o: o.split("=")[0].lstrip("+~") not in groups)
    good: list[str] = []
    faults: list[str] = []
    for override in ordered:
        try:
            _composed(job, [*good, override])
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            faults.append(_override_fault(override, error, keys, groups))
        else:
            good.append(override)
    return [o for o in overrides if o in good], faults


def _override_fault(override: str, error: Exception, keys: Sequence[str], groups: Sequence[str]) -> str:
    key, _, value = override.lstrip("+~").partition("=")
    if not _:
        return f"{override!r} is not an override: write key=value"
    if key in groups and key not in ("hydra",):
        names = sorted(p.stem for p in (config_folder() / key).glob("*.yaml"))
        if value.strip("'\"") not in names:
            return f"{override}: there is no conf/{key}/{value}.yaml; choose one of {', '.join(names)}"
    if key not in keys:
        near = difflib.get_close_matches(key, [*keys, *groups], n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "see the keys with --cfg job"
        return f"{key} is unknown: {hint}"
    return f"{override.lstrip('+')}: {_first_lines(error)}"


def _dotted(values: Any, path: str = "") -> list[str]:
    if not isinstance(values, dict) or not values:
        return [path]
    inner = [
        name
        for key, value in values.items()
        for name in _dotted(value, f"{path}.{key}" if path else str(key))
    ]
    return [path, *inner] if path else inner


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).strip().split("\n")[:2])


def quiet_hydra() -> None:
    """Let Hydra raise instead of printing and leaving with status 1: the command line tells faults its own way."""
    os.environ["HYDRA_FULL_ERROR"] = "1"


def plain(override: str) -> str:
    """An override `key=value` as Hydra takes it: its value quoted where Hydra could not read it."""
    key, equals, value = override.partition("=")
    return f"{key}={_taken(value)}" if equals else override


def _taken(value: str) -> str:
    if _readable(value):
        return value
    text = value.strip()
    if text[:1] == "[" and text[-1:] == "]":
        return f"[{','.join(_taken(part.strip()) for part in _parts(text[1:-1]))}]"
    if text[:1] == "{" and text[-1:] == "}":
        entries = [_ENTRY.fullmatch(part) for part in _parts(text[1:-1])]
        found = [f"{entry[1]}: {_taken(entry[2].strip())}" for entry in entries if entry]
        if len(found) == len(entries):
            return "{" + ", ".join(found) + "}"
    # A backslash is itself, but before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


def _parts(text: str) -> list[str]:
    """Text cut at the commas that stand in no bracket and in no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not parts[-1].strip():
            quote = letter
        elif letter in _OPEN + _CLOSE:
            depth += 1 if letter in _OPEN else -1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return parts


def _readable(value: str) -> bool:
    if _HARMLESS.fullmatch(value):
        return True
    try:
        _parser().parse_override(f"x={value}")
    except HydraException:
        return False
    return True


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()
