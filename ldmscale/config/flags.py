"""The options of a command line: those that Hydra knows, --config-dir, and what is no option at all."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ldmscale.config.folders import SEARCH_PATH, search_override
from ldmscale.errors import ConfigError

CONFIG_DIR = ("--config-dir", "-cd")
_VALUED = ("--cfg", "-c", "--package", "-p")
_ALONE = ("--help", "-h", "--hydra-help", "--version", "--multirun", "-m", "--resolve", "--info", "-i")
_NOTHING = ("--run", "-r")  # what happens anyway
_REFUSED = {
    "--config-path": "give --config-dir DIR, which is searched in addition to conf/",
    "-cp": "give --config-dir DIR, which is searched in addition to conf/",
    "--config-name": "the name of the job chooses the configuration; give experiment=NAME with --config-dir DIR",
    "-cn": "the name of the job chooses the configuration; give experiment=NAME with --config-dir DIR",
    "--experimental-rerun": "the same command starts a run again",
}


@dataclass(frozen=True)
class CommandLine:
    """The words of a command line: `flags` with their values, and overrides, the search path among them."""

    flags: list[str]
    overrides: list[str]

    @property
    def sweep(self) -> bool:
        return any(word in ("--multirun", "-m") for word in self.flags) or self._mode

    @property
    def _mode(self) -> bool:
        return any(word.lstrip("+").upper() == "HYDRA.MODE=MULTIRUN" for word in self.overrides)


def parse(job: str, words: Sequence[str], own: Sequence[str] = ()) -> CommandLine:
    """Options apart from overrides; `own`: further options of the job. Raises ConfigError with all that is neither."""
    flags: list[str] = []
    overrides: list[str] = []
    faults: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in CONFIG_DIR or name in _VALUED or name in _REFUSED:
            if not equals:
                value = rest.pop(0) if rest else ""
            if name in _REFUSED:
                faults.append(f"{name} {value} is not supported: {_REFUSED[name]}")
            elif not value:
                faults.append(f"{name} has no value: {_example(name)}")
            elif name in CONFIG_DIR:
                try:
                    overrides.append(search_override(value))
                except ConfigError as error:
                    faults += error.faults
            elif name in ("--cfg", "-c") and value not in ("job", "hydra", "all"):
                faults.append(f"{name} {value}: expected job, hydra or all; {_example(name)}")
                rest = [value, *rest] if "=" in value else rest
            else:
                flags += [name, value]
        elif word in _ALONE or word in own:
            flags.append(word)
            if word in ("--info", "-i") and rest and rest[0] and "=" not in rest[0] and rest[0][0] != "-":
                flags.append(rest.pop(0))
        elif word.startswith("-") and word not in _NOTHING:
            faults.append(_no_option(job, word, own))
        elif word not in _NOTHING:
            overrides.append(word)
    if len([word for word in overrides if word.lstrip("+").startswith(f"{SEARCH_PATH}=")]) > 1:
        faults.append(f"several folders of configurations: give them as one list, {SEARCH_PATH}=[DIR,DIR]")
    if faults:
        raise ConfigError(faults)
    return CommandLine(flags, overrides)


def _example(name: str) -> str:
    examples = {"--cfg": "--cfg job", "-c": "-c job", "--config-dir": "--config-dir DIR", "-cd": "-cd DIR"}
    return f"write {examples.get(name, name + ' NAME')}"


def _no_option(job: str, word: str, own: Sequence[str]) -> str:
    bare = word.lstrip("-")
    key, equals, _ = bare.partition("=")
    if equals or "." in key:
        return f"{word}: settings have no dashes; write {bare if equals else key + '=VALUE'}"
    names = [*_VALUED, *_ALONE, *own, "--config-dir", "--shell-completion"]
    near = difflib.get_close_matches(word, [name for name in names if name.startswith("--")], n=1)
    hint = f"did you mean {near[0]}?" if near else f"settings are key=value; see `ldmscale {job} --help`"
    return f"{word} is no option of {job}: {hint}"
