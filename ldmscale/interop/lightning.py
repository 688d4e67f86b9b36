"""What a .ckpt holds besides its state_dict (epoch, callbacks, hyper-parameters, optimizers): kept bit for bit, as JSON.

lightning.json           the values; what JSON has no form for is {"": KIND, ...}
lightning.safetensors    the tensors among them, under their paths
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ldmscale.errors import DataError
from ldmscale.interop.pickles import plain
from ldmscale.interop.tensors import read_json, read_safetensors, write_safetensors

log = logging.getLogger(__name__)

_LONGEST_NUMBER = 1 << 64  # larger ones are written in hexadecimal digits: Python limits decimal ones
_KEPT = (bool, int, float, complex, str, bytes, bytearray, Tensor, type(None))


def storable(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Values of a .ckpt that `interop.limits` has passed, in types that can be written.

    Instances of classes that are not imported become what they held, and classes their names. One line is logged of them.
    """
    changed: dict[str, list[str]] = {}  # key -> types

    def kept(value: Any, key: str) -> Any:
        if isinstance(value, _KEPT):
            return value
        if isinstance(value, Mapping):
            return {kept(k, key): kept(v, key) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            kind: Callable[[Any], Any] = next(
                kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind)
            )
            return kind(kept(v, key) for v in value)
        changed.setdefault(key, []).append(type(value).__name__)
        if isinstance(value, type):
            return f"{value.__module__}.{value.__qualname__}"
        simple = plain(value)
        return kept(simple, key) if simple is not value else str(value)

    try:
        found = {str(key): kept(value, str(key)) for key, value in values.items()}
    except TypeError as error:
        raise DataError(
            f"the checkpoint has a key of a dictionary that cannot be kept ({error}): remove it"
        ) from error
    if changed:
        told = "; ".join(f"{key}: {', '.join(sorted(set(kinds)))}" for key, kinds in sorted(changed.items()))
        log.warning("objects of these classes are kept as their contents or names: %s", told)
    return found


def write_lightning(values: Mapping[str, Any], folder: Path) -> None:
    """Write the two files. Shared tensors are written each."""
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            name = path.encode("utf-8", "backslashreplace").decode("utf-8")
            while name in tensors:  # the keys 1 and "1" of one dictionary
                name += "'"
            tensors[name] = value
            return {"": "tensor", "at": name}
        if isinstance(value, dict):
            pairs = [[encode(k, ""), encode(v, f"{path}/{k}".lstrip("/"))] for k, v in value.items()]
            return {"": "dict", "of": pairs}
        if isinstance(value, (list, tuple)):
            items = [encode(v, f"{path}/{i}".lstrip("/")) for i, v in enumerate(value)]
            return {"": "tuple", "of": items} if isinstance(value, tuple) else items
        if isinstance(value, (set, frozenset)):
            return {"": type(value).__name__, "of": [encode(v, path) for v in sorted(value, key=repr)]}
        if isinstance(value, (bytes, bytearray)):
            return {"": type(value).__name__, "of": base64.b64encode(value).decode()}
        if isinstance(value, complex):
            return {"": "complex", "of": [value.real, value.imag]}
        if isinstance(value, int) and abs(value) >= _LONGEST_NUMBER:
            return {"": "int", "of": hex(value)}
        return value

    # Escapes alone: a text of a pickle may hold half a surrogate pair, which UTF-8 has no form for.
    text = json.dumps(encode(dict(values), ""), indent=2)
    (folder / "lightning.json").write_text(text + "\n", encoding="utf-8")
    if tensors:
        write_safetensors(folder / "lightning.safetensors", tensors)


def read_lightning(folder: Path) -> dict[str, Any]:
    """Read what `write_lightning` wrote. Raises DataError, KeyError, TypeError or ValueError for anything else."""
    path = folder / "lightning.safetensors"
    tensors = read_safetensors(path) if path.is_file() else {}
    kinds: dict[str, Callable[[Any], Any]] = {
        "tensor": lambda raw: tensors[raw["at"]],
        "tuple": lambda raw: tuple(decode(v) for v in raw["of"]),
        "set": lambda raw: {decode(v) for v in raw["of"]},
        "frozenset": lambda raw: frozenset(decode(v) for v in raw["of"]),
        "bytes": lambda raw: base64.b64decode(raw["of"]),
        "bytearray": lambda raw: bytearray(base64.b64decode(raw["of"])),
        "complex": lambda raw: complex(*raw["of"]),
        "int": lambda raw: int(raw["of"], 16),
        "dict": lambda raw: {decode(k): decode(v) for k, v in raw["of"]},
    }

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(v) for v in value]
        return kinds[value[""]](value) if isinstance(value, dict) else value

    return cast(dict[str, Any], decode(read_json(folder / "lightning.json")))
