"""The prompts of `ldmscale sample`, from a list, a file or standard input, and those that stand against them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.config import SampleConfig
from ldmscale.data.conditions.annotations import ClassLabels
from ldmscale.errors import ConfigError, DataError
from ldmscale.storage.given_files import lines_of, read_given_text


def read_prompts(given: str | tuple[str, ...]) -> list[str]:
    """A list as it is; "-" reads standard input, the name of a file its lines; anything else is one prompt.

    Raises ConfigError where there is no prompt.
    """
    prompts = [prompt for prompt in _lines(given) if prompt]
    if not prompts:
        raise ConfigError(
            "sample.prompts names no prompt: give 'sample.prompts=[a red dragon]', a file, or - for standard input"
        )
    return prompts


def prompts_of_conditions(config: SampleConfig) -> list[str]:
    """One prompt for each file of a condition: those that are given, one for all, or else the names of the files.

    Raises ConfigError where there are not as many.
    """
    from ldmscale.inference.condition_files import condition_files

    assert config.condition is not None
    names = [file.stem for file in condition_files(config.condition)]
    if config.prompts is None:
        return names
    texts = read_prompts(config.prompts)
    texts = texts * len(names) if len(texts) == 1 else texts
    if len(texts) != len(names):
        raise ConfigError(
            f"sample.prompts has {len(texts)} entries for {len(names)} files of sample.condition: give one for each, one for "
            "all, or none"
        )
    return texts


def read_negatives(given: str | tuple[str, ...] | None, count: int) -> list[str]:
    """One negative prompt for each of `count` prompts: a list or the lines of a file one for each, else one for all.

    Raises ConfigError where there are not as many.
    """
    if given is None:
        return [""] * count
    negatives = [given] if given == "-" else _lines(given)
    if isinstance(given, str) and not Path(given).is_file():
        return negatives * count
    if len(negatives) != count:
        raise ConfigError(
            f"sample.negative_prompts has {len(negatives)} entries for {count} prompts: give one for each (an empty line is "
            "the null condition), or one text for all"
        )
    return negatives


def _lines(given: str | tuple[str, ...]) -> list[str]:
    """Raises ConfigError for a text that can only be the name of a file and is none, and for bytes that are no text."""
    if not isinstance(given, str):
        return [text.strip() for text in given]
    try:
        if given == "-":
            return [line.strip() for line in lines_of(sys.stdin.buffer.read().decode("utf-8-sig"))]
        if len(given) < 255 and Path(given).is_file():
            text = read_given_text(Path(given), "give text in UTF-8, a prompt a line", ConfigError)
            return [line.strip() for line in lines_of(text)]
    except UnicodeDecodeError as error:
        source = "standard input" if given == "-" else given
        raise ConfigError(
            f"{source} cannot be read as prompts ({error}): give text in UTF-8, a prompt a line"
        ) from error
    if given.endswith(".txt") or (os.sep in given and Path(given).is_dir()):
        raise ConfigError(
            f"there is no file {given} of prompts: give the path of one, or, if this is a prompt, the list '[\"{given}\"]'"
        )
    return [given]


def run_of(model: Path) -> RunFolder | None:
    """The run that `sample.model` is, or that it is a checkpoint of; None for models of other formats."""
    run = RunFolder(model.parent.parent if (model / "COMPLETE").is_file() else model)
    return run if run.config_file.is_file() else None


def faults_of_classes(model: Path, prompts: Sequence[str]) -> list[str]:
    """Prompts that name no class of a run, seen before the folder is begun; `sample` refuses those of other models."""
    run = run_of(model)
    if run is None or not run.classes.is_file() or run.config().get("class_embedder") is None:
        return []
    classes, faults = ClassLabels.load(run.classes), []
    for prompt in dict.fromkeys(prompts):
        try:
            classes.number(prompt)
        except DataError as error:
            faults += [f"sample.prompts: {fault}" for fault in error.faults]
    return faults
