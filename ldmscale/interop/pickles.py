"""Reading CompVis' .ckpt files, which are pickles that a Lightning run left, without executing anything in them.

A pickle names functions and classes to call. Before a file is opened, every name in it is listed; what is
neither part of PyTorch's restricted loader nor in the tables below is refused by name. Classes of Lightning
and OmegaConf are never imported: an inert stand-in takes their place and keeps what was stored in them.
"""

from __future__ import annotations

import itertools
import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import safe_globals

from ldmscale.errors import DataError
from ldmscale.interop.limits import check_tensors, check_values, tensors_in
from ldmscale.storage.given_files import refuse_lfs_pointer

_MOST_BYTES = 1 << 25  # of a pickle beside its tensors; one of 1,000 tensors has 200 kB
_MOST_OPERATIONS = 4_000_000  # of all pickles of a file


class Inert:
    """In place of an instance of a class that is not imported: the arguments and the state it was stored with."""

    def __new__(cls, *arguments: Any) -> Inert:
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __init__(self, *arguments: Any) -> None:
        self.arguments: tuple[Any, ...] = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _NumpyType(Inert):
    """numpy.dtype, as a code such as "f8"."""


class _PlainDict:
    """Subclasses of dict become dictionaries."""

    def __new__(cls, *_: Any) -> Any:
        return {}


def _numpy_scalar(kind: _NumpyType, stored: bytes | str) -> Any:
    code = str(kind.arguments[0])
    if code.lstrip("<>|=")[:1] not in ("b", "i", "u", "f"):
        raise pickle.UnpicklingError(f"a numpy scalar of type {code!r}")
    big = bool(kind.state) and kind.state[1] == ">"
    raw = stored if isinstance(stored, bytes) else stored.encode("latin1")
    return np.frombuffer(raw, np.dtype(code).newbyteorder(">" if big else "="))[0].item()


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


# What may be called, and what is called in its place.
_CALLABLE: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _NumpyType,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "collections.defaultdict": _plain_dict,
    "argparse.Namespace": type("Namespace", (Inert,), {}),
    "pytorch_lightning.utilities.parsing.AttributeDict": _PlainDict,
    "lightning.pytorch.utilities.parsing.AttributeDict": _PlainDict,
    "lightning_fabric.utilities.data.AttributeDict": _PlainDict,
    "lightning.fabric.utilities.data.AttributeDict": _PlainDict,
}
_INERT_PREFIXES = (
    "pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.dtypes.",
)  # fmt: skip
_INERT_NAMES = {
    "typing.Any",
    *(f"builtins.{n}" for n in ("dict", "list", "tuple", "int", "float", "str", "bool")),
}
# What PyTorch's restricted loader makes by itself (torch.load, weights_only).
_TORCH_PREFIXES = ("torch.",)
_TORCH_NAMES = {
    "collections.OrderedDict", "collections.Counter", "_codecs.encode",
    "builtins.bytearray", "builtins.set", "builtins.complex",
}  # fmt: skip


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a .ckpt; tensors are mapped from the file where its layout allows.

    Raises DataError for a file that is no checkpoint, for one that would call anything but the making of tensors and plain
    values, and for one that expands to far more than its own size; nothing of such a file is executed.
    """
    refuse_lfs_pointer(path)
    try:
        names = _named(path)
    except (
        OSError,
        ValueError,
        EOFError,
        IndexError,
        OverflowError,
        MemoryError,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(
            f"{path} is no checkpoint that PyTorch wrote ({error}): give a .ckpt, .safetensors or a diffusers folder"
        ) from error
    stand_ins: list[tuple[Callable[..., Any], str]] = []
    refused = []
    for name in sorted(names):
        if name in _CALLABLE:
            stand_ins.append((_CALLABLE[name], name))
        elif name in _INERT_NAMES or name.startswith(_INERT_PREFIXES):
            module, _, short = name.rpartition(".")
            stand_ins.append((type(short, (Inert,), {"__module__": module}), name))
        elif not (name in _TORCH_NAMES or name.startswith(_TORCH_PREFIXES)):
            refused.append(name)
    if refused:
        raise DataError(
            f"{path} is a pickle that calls {', '.join(refused)}: a model needs no such thing, and it could do harm, so the "
            "file was not opened; if you trust where it comes from, load it there and save its state_dict as .safetensors"
        )
    with safe_globals(stand_ins):  # type: ignore[arg-type]
        try:
            found = _torch_load(path)
        except (
            Exception
        ) as error:  # a damaged pickle makes PyTorch's loader raise whatever its operations raise
            raise DataError(
                f"{path} cannot be read as weights only ({_reason(error)}): save its state_dict as .safetensors where it "
                "comes from"
            ) from error
    if not isinstance(found, (dict, OrderedDict)):
        raise DataError(f"{path} holds a {type(found).__name__}, expected a dictionary with a state_dict")
    check_values(found, str(path))
    check_tensors(tensors_in(found), path)
    return dict(found)


def _reason(error: Exception) -> str:
    """What PyTorch's loader found, without its advice: that is to load the file with less care."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    text = text.rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    first = text.splitlines()[0].partition(" Please ")[0]
    if re.search(r"weights_only|safe_globals|Weights only load failed", first):
        return "its loader refuses what is in it"
    return (
        first
        if isinstance(error, (pickle.UnpicklingError, RuntimeError))
        else f"{type(error).__name__}: {first}"
    )


def _torch_load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _named(path: Path) -> set[str]:
    """Every function and class that the file names, found without loading it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = path.stat().st_size
            for member in archive.infolist():
                # PyTorch stores members as they are. A compressed one can expand a thousandfold.
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"its member {member.filename!r} is compressed")
                if member.file_size > size:
                    raise ValueError(
                        f"its member {member.filename!r} claims {member.file_size:,} of {size:,} bytes"
                    )
            members = [member for member in archive.infolist() if member.filename.endswith("data.pkl")]
            if not members:
                raise ValueError("an archive without data.pkl")
            if sum(member.file_size for member in members) > _MOST_BYTES:
                raise ValueError(f"a data.pkl of more than {_MOST_BYTES:,} bytes")
            count = itertools.count(1)
            return {name for member in members for name in _globals(archive.read(member), count)}
    with open(path, "rb") as file:  # before PyTorch 1.6: several pickles, then the storages
        count = itertools.count(1)
        return {name for _ in range(5) for name in _globals(file, count)}


def _globals(source: Any, count: Iterator[int]) -> Iterator[str]:
    """`count` numbers the operations of all pickles of a file."""
    strings: list[str] = []
    for code, argument, _ in pickletools.genops(source):
        if next(count) > _MOST_OPERATIONS:
            raise ValueError(f"a pickle of more than {_MOST_OPERATIONS:,} operations")
        if code.name in ("GLOBAL", "INST"):
            yield _modern(str(argument).replace(" ", "."))
        elif code.name == "STACK_GLOBAL":  # protocol 4 and later: module and name are the strings before it
            yield _modern(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)


def _modern(name: str) -> str:
    """Names that Python 2 gave, as PyTorch's loader translates them."""
    module, _, short = name.rpartition(".")
    if (module, short) in NAME_MAPPING:
        return ".".join(NAME_MAPPING[module, short])
    return f"{IMPORT_MAPPING.get(module, module)}.{short}"


def plain(value: Any) -> Any:
    """What a stored value means in plain terms: OmegaConf's nodes and namespaces become dictionaries and lists."""
    if isinstance(value, Inert):
        state = value.state if isinstance(value.state, dict) else {}
        if "_content" in state:
            return plain(state["_content"])
        if "_val" in state:
            return plain(state["_val"])
        return plain(state) if state else [plain(a) for a in value.arguments]
    if isinstance(value, dict):
        return {k if isinstance(k, (str, int)) else str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value
