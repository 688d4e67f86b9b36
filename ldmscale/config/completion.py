"""Shell completion: jobs, groups and their options, settings, and the values of settings that have a few.

`ldmscale --shell-completion install=bash` writes a script for the shell to evaluate; its function asks
`ldmscale --shell-completion query=bash` for the candidates of the word under the cursor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin

from ldmscale.config import JOBS
from ldmscale.config.flags import CONFIG_DIR
from ldmscale.config.folders import config_folders, groups_of, options, search_override
from ldmscale.config.overrides import members, typed_settings
from ldmscale.errors import ConfigError

_OPTIONS = ("--help", "--cfg", "--resolve", "--multirun", "--config-dir", "--info")
_SUBMIT = ("--help", "--cfg", "--config-dir", "--dry-run")
_FIRST = ("--help", "--version", "--shell-completion")
_INSTALL = "install=bash"
# bash cuts words at the characters of COMP_WORDBREAKS, and replaces what follows the last of them.
_BASH = r"""_ldmscale() {
    local word=${COMP_LINE:0:COMP_POINT} before
    word=${word##*[[:space:]]}
    before=$word
    [[ $COMP_WORDBREAKS == *:* ]] || before=${before//:/_}
    [[ $COMP_WORDBREAKS == *=* ]] || before=${before//=/_}
    before=${before##*[:=]}
    local cut=$(( ${#word} - ${#before} ))
    mapfile -t COMPREPLY < <(COMP_LINE=$COMP_LINE COMP_POINT=$COMP_POINT "$1" --shell-completion query=bash 2>/dev/null)
    local place
    for place in "${!COMPREPLY[@]}"; do
        [[ -n ${COMPREPLY[place]} ]] || { unset "COMPREPLY[place]"; continue; }
        COMPREPLY[place]=${COMPREPLY[place]:cut}
    done
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[*]} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _ldmscale ldmscale"""


def script(words: Sequence[str]) -> str:
    """The script that `words` ask for. Raises ConfigError for another shell."""
    if list(words) == [_INSTALL]:
        return _BASH
    if list(words) == ["uninstall=bash"]:
        return "complete -r ldmscale; unset -f _ldmscale"
    raise ConfigError(
        f"--shell-completion {' '.join(words)}: expected {_INSTALL} or uninstall=bash; write "
        f'eval "$(ldmscale --shell-completion {_INSTALL})" into ~/.bashrc'
    )


def candidates(line: str, jobs: Iterable[str]) -> list[str]:
    """The words that may stand where `line`, a command line up to the cursor, ends."""
    _, *words = line.split() or [""]
    last = "" if line[-1:].isspace() or not words else words.pop()
    if not words:
        return _fitting([*jobs, *_FIRST], last)
    job, *words = words
    if job in ("--shell-completion", "-sc"):
        return _fitting([_INSTALL, "uninstall=bash"], last)
    if job not in JOBS:
        return []
    if words[-1:] in (["--cfg"], ["-c"]):
        return _fitting(["job", "hydra", "all"], last)
    if words[-1:] and words[-1] in CONFIG_DIR:
        return []  # the shell completes folders
    found = [*_SUBMIT] if job == "submit" else [*_OPTIONS]
    folders = config_folders([*words, *_searched(words)])
    kinds = {"submit": typed_settings("submit")} if job == "submit" else {}
    groups = ["cluster"] if job == "submit" else []
    if job == "submit":
        if not words:
            return _fitting(
                [*(name for name in jobs if name not in ("submit", "quickstart")), "pipeline"], last
            )
        job = words[0]
    if job in JOBS:
        kinds[job] = typed_settings(job)
        groups += groups_of(job)
    settings = {key: kind for typed in kinds.values() for key, kind in typed.items() if key != "job"}
    key, equals, _ = last.lstrip("+").partition("=")
    if not equals:
        return _fitting([*found, *(f"{name}=" for name in sorted({*settings, *groups}))], last)
    values = options(key, folders) if key in groups else _values(settings.get(key))
    if key == "experiment":
        values = sorted({*values, *(name.removesuffix(f"_{job}") for name in values)})
    return _fitting([f"{key}={value}" for value in values], last)


def _searched(words: Sequence[str]) -> list[str]:
    found = []
    for place, word in enumerate(words[:-1]):
        if word in CONFIG_DIR:
            try:
                found.append(search_override(words[place + 1]))
            except ConfigError:
                continue  # there is no such folder
    return found


def _values(type_: Any) -> list[str]:
    """The values of a setting that has a few."""
    found = []
    for member in members(type_):
        if get_origin(member) is Literal:
            found += [str(value) for value in get_args(member)]
        elif member is bool:
            found += ["true", "false"]
        elif member is type(None) and type_ is not None:
            found.append("null")
    return found


def _fitting(words: Iterable[str], start: str) -> list[str]:
    return [word for word in words if word.startswith(start)]
