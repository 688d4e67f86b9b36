"""A model in another format, appearing whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from ldmscale.errors import CheckpointError, ConfigError
from ldmscale.interop import compvis, compvis_config
from ldmscale.interop.diffusers_folder import write_folder
from ldmscale.interop.model import Model
from ldmscale.interop.tensors import own_storage, write_safetensors
from ldmscale.storage.atomic import appearing, appearing_file

log = logging.getLogger(__name__)

FILES = (".ckpt", ".safetensors")


def write(model: Model, dst: Path, form: str, ema: bool, overwrite: bool) -> None:
    """Write a model as `form`: "diffusers", a folder; "compvis", a folder of model.ckpt and config.yaml, or a file.

    A CompVis dst that ends in .ckpt or .safetensors is a file, and its yaml lies beside it under the same name. In a folder
    the checkpoint is of the kind that was imported, .ckpt otherwise. CompVis' checkpoints hold both the raw and the
    averaged weights of a model that has both; `ema` chooses between them for diffusers (see `write_folder`).

    Raises ConfigError naming everything that the format has no place for, before anything is written.
    """
    if form == "diffusers":
        with appearing(dst, overwrite) as folder:
            write_folder(model, folder, ema)
        return
    state = compvis.to_state(model)
    settings = yaml.safe_dump(compvis_config.written(model), sort_keys=False)
    if model.tokenizer is not None:
        log.warning(
            "not written, since CompVis' checkpoints have no place for it: the tokenizer (BERTEmbedder takes bert-base-uncased); "
            "an import of the result needs tokenizer=%s", model.tokenizer,
        )  # fmt: skip
    if dst.suffix in FILES:
        # The large file first: where it does not fit, nothing is left.
        appearing_file(dst, overwrite, lambda path: _write_checkpoint(model, state, path))
        appearing_file(dst.with_suffix(".yaml"), overwrite, lambda path: _write_text(path, settings))
        return
    suffix = ".safetensors" if model.source.get("suffix") == ".safetensors" else ".ckpt"
    with appearing(dst, overwrite) as folder:
        _write_text(folder / "config.yaml", settings)
        _write_checkpoint(model, state, folder / f"model{suffix}")


def chosen(model: Model, parts: Sequence[str]) -> Model:
    """The model with some of its parts only. Raises ConfigError for parts that it does not have."""
    if unknown := sorted(set(parts) - set(model.parts)):
        raise ConfigError(f"parts has {', '.join(unknown)}: this model's parts are {', '.join(model.parts)}")
    left = sorted(set(model.parts) - set(parts))
    log.warning(
        "left out, since parts does not name them: %s", ", ".join([*left, *compvis.kinds_kept(model)])
    )
    return replace(
        model,
        parts={name: model.parts[name] for name in model.parts if name in parts},
        kept={},
        lightning={},
        tokenizer=model.tokenizer if "text_encoder" in parts else None,
        class_names=model.class_names if "class_embedder" in parts else None,
        unknown={key: told for key, told in model.unknown.items() if key.split(".")[0] in parts},
        source={} if left else model.source,
    )


def _write_checkpoint(model: Model, state: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        write_safetensors(path, state)
        if model.lightning:
            log.warning(
                "a .safetensors has no place for what the .ckpt held besides its tensors: %s",
                ", ".join(model.lightning),
            )
        return
    # Storages of their own: of a mapped file, torch.save would write the whole for each tensor's sake.
    content = {"state_dict": {k: own_storage(v) for k, v in state.items()}, **model.lightning}
    try:
        torch.save(content, path)
    except RuntimeError as error:  # PyTorch's zip writer has no OSError
        raise CheckpointError(
            f"{path} cannot be written ({error}): free room there and run the command again"
        ) from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
