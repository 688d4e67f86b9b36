"""Names that files, stores and servers bring, accepted in the few forms that are written here.

A manifest, an index or a listing names files, and whoever wrote it may have written an absolute path or `..`. Each such name
passes `accepted` before anything is opened, created or removed under it. No form contains a separator of folders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ldmscale.errors import LdmscaleError

_LONGEST = 255  # bytes of a file's name
_SHOWN = 120  # characters of a refused name in a message


@dataclass(frozen=True)
class Form:
    """What a kind of names looks like: in words for messages, and as a regular expression of the whole name."""

    words: str
    pattern: re.Pattern[str]


def _form(words: str, pattern: str) -> Form:
    return Form(words, re.compile(pattern, re.ASCII))


# No separator, and no point or dash first: neither a folder above, nor a hidden file, nor an option.
_PLAIN = r"[^/\\.\-][^/\\]*"
PLAIN = _form("a plain file name", _PLAIN)
FOLDER = _form("the plain name of a folder", _PLAIN)
SAFETENSORS = _form("a plain file name that ends in .safetensors", _PLAIN + r"\.safetensors")
WEIGHTS = _form("a plain file name that ends in .safetensors or .bin", _PLAIN + r"\.(safetensors|bin)")
TAR = _form("a plain file name that ends in .tar", _PLAIN + r"\.tar")
TOKENIZER_FILE = _form("a plain file name that ends in .json, .txt or .model", _PLAIN + r"\.(json|txt|model)")
RANK_FILE = _form("rank_00000.safetensors or the like", r"rank_[0-9]{5,9}\.safetensors")
SHA256 = _form("64 hexadecimal digits", r"[0-9a-f]{64}")
SLURM_JOB = _form("the number of a Slurm job", r"[0-9]{1,12}")
WANDB_ID = _form("letters, digits, dashes and underscores", r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


def has_form(name: object, form: Form) -> bool:
    """Whether `name`, of whatever type it was read, is a text of this form that can be shown and be a file's name."""
    if not isinstance(name, str) or not name.isprintable() or form.pattern.fullmatch(name) is None:
        return False
    return len(name.encode()) <= _LONGEST


def accepted(name: object, form: Form, source: object, error: type[LdmscaleError]) -> str:
    """Returns `name`, which `source` brought, if it has the form. Raises `error` otherwise."""
    if not has_form(name, form):
        raise error(
            f"{source} names {shown(name)}: expected {form.words}; nothing under that name is read or written"
        )
    return str(name)


def shown(name: object) -> str:
    """A name in a message: quoted, control characters escaped, and cut."""
    text = repr(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
