"""Calls that could run code of a file that others made: each says that it must not, wherever it stands in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
FILES = sorted(file for folder in ("ldmscale", "benchmarks") for file in (CHECKOUT / folder).rglob("*.py"))
# The end of a call's name, and the argument that keeps it from running code of the file or folder that it reads.
SAFE = {
    "from_pretrained": "trust_remote_code=False",
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle=False",
    "numpy.load": "allow_pickle=False",
}
# A program that asks on standard input would take the prompts of a job for its answer.
QUIET = {"subprocess.run": "stdin="}
NEVER = (
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "torch.hub.load", "torch.jit.load",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load", "eval", "exec", "input", "os.system", "os.popen",
)  # fmt: skip


def calls(source: str) -> Iterator[tuple[int, str, list[str]]]:
    """Line, name, and keyword arguments as written of every call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            given = [f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords if word.arg]
            yield node.lineno, ast.unparse(node.func), given


def faults(source: str, needs: dict[str, str]) -> list[str]:
    found = []
    for line, name, given in calls(source):
        if name in NEVER:
            found.append(f"{line}: {name}")
        for ending, needed in needs.items():
            if (name == ending or name.endswith(f".{ending}")) and not any(
                word.startswith(needed) for word in given
            ):
                found.append(f"{line}: {name} without {needed}")
        if "shell=True" in given:
            found.append(f"{line}: {name} with shell=True")
    return found


def test_no_call_can_run_code_of_a_file_that_it_reads() -> None:
    for file in FILES:
        needs = SAFE if "benchmarks" in file.relative_to(CHECKOUT).parts else {**SAFE, **QUIET}
        assert faults(file.read_text(), needs) == [], file


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "kind.from_pretrained(name, **wanted)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=None)",
        "np.load(file)",
        "pickle.loads(data)",
        "yaml.load(text, Loader=Loader)",
        "answer = input('run it? ')",
        "subprocess.Popen(command, shell=True)",
        "subprocess.run(command)",
    ],
)
def test_such_a_call_is_found(source: str) -> None:
    assert len(faults(source, {**SAFE, **QUIET})) == 1
