"""diffusers folders as models and back: one network, or a pipeline with a subfolder for each component.

What diffusers has no place for (schedule buffers, loss networks) lies in the subfolder `ldmscale/` of an export, which
diffusers does not look at; reading the folder takes it back.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmscale.builders.networks import build_autoencoder, build_text_encoder, build_unet
from ldmscale.config import AutoencoderConfig, ImportedUNetConfig, TextEncoderConfig
from ldmscale.errors import ConfigError, DataError
from ldmscale.interop import diffusers_config as config_there
from ldmscale.interop import diffusers_names as names_there
from ldmscale.interop.compvis_names import TEXT_HEAD
from ldmscale.interop.diffusers_names import schedule_config, schedule_values
from ldmscale.interop.model import Model, Part, PartConfig
from ldmscale.interop.pickles import read_pickle
from ldmscale.interop.tensors import (
    Slot,
    faults_of,
    given,
    read_json,
    read_object,
    read_safetensors,
    shapes_of,
    taken,
    write_json,
    write_safetensors,
)
from ldmscale.storage.names import FOLDER, SAFETENSORS, accepted, has_form, shown

log = logging.getLogger(__name__)

BESIDE = "ldmscale"  # the subfolder of what diffusers has no place for
FOLDERS = {"unet": "unet", "autoencoder": "vqvae", "text_encoder": "bert"}
TEXT_PIPELINE = "LDMTextToImagePipeline"
PIPELINE_TOKENS = 77  # it tokenises to this length, whatever the model's
# Variants of a weights file by which diffusers' users keep both copies.
RAW_BESIDE_AVERAGED, AVERAGED_BESIDE_RAW = "non_ema", "ema"


_PIECE = re.compile(r"-\d{5}-of-\d{5}$")


def is_diffusers(folder: Path) -> bool:
    """Whether a folder holds a diffusers network or pipeline."""
    if (folder / "model_index.json").is_file():
        return True
    configs = [folder / "config.json", *folder.glob("*/config.json")]
    return any(
        config_there.class_of(read_object(path)) in config_there.READERS for path in configs if path.is_file()
    )


def read_folder(folder: Path) -> Model:
    """The model in a diffusers folder. Raises DataError with every fault of all its components at once."""
    model = Model(source={"format": "diffusers", "layout": "single", "components": {}})
    faults: list[str] = []
    if (folder / "config.json").is_file():
        _read_component(model, "", folder, faults)
    else:
        index = read_object(folder / "model_index.json") if (folder / "model_index.json").is_file() else None
        model.source |= {"layout": "folders", "index": index}
        for path in sorted(p for p in folder.iterdir() if p.is_dir() and p.name != BESIDE):
            if path.name.startswith("."):
                continue  # of git or of a download
            if (path / "scheduler_config.json").is_file():
                _read_scheduler(model, path, faults)
            elif (path / "vocab.txt").is_file() or (path / "tokenizer.json").is_file():
                model.tokenizer = path
                model.source["tokenizer"] = path.name
            elif (path / "config.json").is_file():
                _read_component(model, path.name, path, faults)
            else:
                faults.append(f"{path.name}/ holds no component that is known")
        if (index or {}).get("_class_name") == TEXT_PIPELINE and model.latent_size and model.autoencoder:
            # The pipeline makes an image of sample_size times the factor, and takes an eighth of it for the latents.
            model.latent_size = model.latent_size * model.autoencoder.factor // 8
        told = {
            name for name, entry in (index or {}).items() if isinstance(entry, list) and entry and entry[0]
        }
        foreign = {name for name in told if not has_form(name, FOLDER)}
        faults += [
            f"model_index.json names {shown(name)}: expected {FOLDER.words}" for name in sorted(foreign)
        ]
        faults += [f"{name}/ is missing" for name in sorted(told - foreign) if not (folder / name).is_dir()]
    if not faults and not model.parts:
        faults.append("it holds no network that can be read: give the folder of a pipeline or of one network")
    if faults:
        raise DataError([f"{folder}: {fault}" for fault in faults])
    if (folder / BESIDE / "kept.safetensors").is_file():
        model.kept = read_safetensors(folder / BESIDE / "kept.safetensors")
    return model


def _read_scheduler(model: Model, path: Path, faults: list[str]) -> None:
    values = read_object(path / "scheduler_config.json")
    model.source["scheduler"] = {"name": path.name, "config": values}
    try:
        model.diffusion = schedule_config(values)
    except DataError as error:
        faults += error.faults


def _read_component(model: Model, name: str, folder: Path, faults: list[str]) -> None:
    values = read_object(folder / "config.json")
    kind = config_there.class_of(values)
    where = f"{name}/" if name else ""
    if kind not in config_there.READERS:
        faults.append(f"{where}config.json is of {kind}: only {', '.join(config_there.READERS)} can be read")
        return
    part, reader = config_there.READERS[kind]
    if part in model.parts:
        faults.append(f"{where}config.json: there is another {part} already")
        return
    try:
        config: PartConfig = reader(values)
        with torch.device("meta"):
            shapes = shapes_of(_build(config))
        found, other, options = _read_weights(
            folder, "model" if part == "text_encoder" else "diffusion_pytorch_model"
        )
    except (DataError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        told = (
            error.faults
            if isinstance(error, DataError)
            else (f"config.json fits no architecture ({type(error).__name__}: {error})",)
        )
        faults += [f"{where}{fault}" for fault in told]
        return
    old = any(key.endswith(".proj_attn.weight") for key in found)
    options |= {"config": values, "old_attention": old}
    slots = _slots(config, list(shapes), values, old)
    known = {slot.foreign for slot in slots}
    head = {key: found[key] for key in TEXT_HEAD if part == "text_encoder" and key in found}
    own: list[str] = []
    for tensors in (found, other):
        if tensors is not None:
            own += faults_of(slots, shapes, tensors)
            own += [
                f"{key} {list(t.shape)} is unknown"
                for key, t in tensors.items()
                if key not in known | set(head)
            ]
    faults += [f"{where}{fault}" for fault in own]
    if own:
        return
    weights, averaged = taken(slots, found), None if other is None else taken(slots, other)
    if options["other"] == RAW_BESIDE_AVERAGED:
        assert averaged is not None
        weights, averaged = averaged, weights
    model.parts[part] = Part(config, weights, averaged, head)
    model.source["components"][part] = options | {"name": name}
    if isinstance(config, AutoencoderConfig) and values.get("scaling_factor") is not None:
        model.scale_by(float(values["scaling_factor"]))
    if isinstance(config, ImportedUNetConfig) and isinstance(values.get("sample_size"), int):
        model.latent_size = values["sample_size"]


def _build(config: PartConfig) -> torch.nn.Module:
    if isinstance(config, ImportedUNetConfig):
        return build_unet(config)
    if isinstance(config, AutoencoderConfig):
        return build_autoencoder(config)
    assert isinstance(config, TextEncoderConfig)
    return build_text_encoder(config)


def _slots(
    config: PartConfig, names: list[str], values: Mapping[str, Any], old_attention: bool
) -> list[Slot]:
    if isinstance(config, TextEncoderConfig):
        return names_there.text_slots(names)
    return names_there.network_slots(names, bool(values.get("use_linear_projection")), old_attention)


def _read_weights(
    folder: Path, stem: str
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Any]]:
    """Tensors of a component, those of its other copy (averaged or raw), and which files they came from."""
    variants = {
        match[1]: path
        for path in sorted(folder.glob(f"{stem}.*.safetensors"))
        if (match := re.fullmatch(rf"{stem}\.([\w-]+)\.safetensors", path.name))
        and not _PIECE.search(match[1])
    }
    # A variant in pieces: STEM.VARIANT-00001-of-00009.safetensors, with an index of its own.
    variants |= {
        path.name.removeprefix(f"{stem}.safetensors.index.").removesuffix(".json"): path
        for path in sorted(folder.glob(f"{stem}.safetensors.index.*.json"))
    }
    plain = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    pickled = folder / ("pytorch_model.bin" if stem == "model" else f"{stem}.bin")
    if plain.is_file():
        found, file = read_safetensors(plain), plain.name
    elif index.is_file():
        found, file = _read_one(index), plain.name
    elif len(variants) == 1:
        path = next(iter(variants.values()))
        file = path.name if path.suffix == ".safetensors" else f"{stem}.{next(iter(variants))}.safetensors"
        return _read_one(path), None, {"file": file, "other": None}
    elif pickled.is_file():
        found, file = read_pickle(pickled), plain.name
    else:
        there = f"; there are the variants {', '.join(variants)}" if variants else ""
        raise DataError(f"{plain.name} is missing, and {pickled.name} too{there}")
    other = next((kind for kind in (RAW_BESIDE_AVERAGED, AVERAGED_BESIDE_RAW) if kind in variants), None)
    if unread := [path.name for kind, path in variants.items() if kind != other]:
        log.warning("%s: %s are copies of the same weights by their names and are not read", folder, unread)
    copies = None if other is None else _read_one(variants[other])
    return found, copies, {"file": file, "other": other}


def _read_one(file: Path) -> dict[str, Tensor]:
    """Tensors of a file, or of all files that an index names."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    found: dict[str, Tensor] = {}
    for name in _parts_of(file):
        found |= read_safetensors(file.parent / name)
    return found


def _parts_of(index: Path) -> list[str]:
    """Names of the files that a model is split into. Raises DataError where one is not in the index's own folder."""
    values = read_json(index)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places:
        raise DataError(f"{index} has no weight_map of tensors and files: download it again")
    return sorted({accepted(name, SAFETENSORS, index, DataError) for name in places.values()})


def write_folder(model: Model, folder: Path, ema: bool) -> None:
    """Write the diffusers folder of a model into `folder`, which is empty.

    Args:
        ema: averaged weights, where there are some, are the ones that diffusers loads; the raw ones lie beside them as
            the variant "non_ema". False: raw ones, and the averaged ones as the variant "ema".

    Raises:
        ConfigError: with everything that diffusers has no place for, before anything is written.
    """
    described = _described(model)
    for part, (place, name, values, options) in described.items():
        _write_component(model.parts[part], folder / place, name, values, options, ema)
    if any(place for place, *_ in described.values()):
        _write_pipeline(
            model, folder, {part: (place, values) for part, (place, _, values, _) in described.items()}
        )
    if model.kept:
        write_safetensors(folder / BESIDE / "kept.safetensors", model.kept)
        log.info("%d tensors that diffusers has no place for are in %s/", len(model.kept), BESIDE)
    if model.lightning:
        log.warning("not written, since diffusers has no place for it: %s", ", ".join(model.lightning))


Described = dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]]


def _described(model: Model) -> Described:
    """(subfolder, weights file, config.json, options of the source) of each part."""
    if model.source.get("format") == "diffusers":
        return {
            part: (options["name"], options["file"], _as_stored(model, options["config"]), options)
            for part, options in model.source["components"].items()
            if part in model.parts
        }
    faults = [*model.unknown.values()]
    if model.learned_null:
        faults.append(
            "diffusion.null_condition=learned: diffusers' null condition is the empty caption; train with "
            "diffusion.null_condition=tokens"
        )
    if model.scale is not None and model.factor is None:
        faults.append(
            "first_stage.scale=channel: diffusers' latents have one scaling_factor, not one per channel; train with "
            "first_stage.scale=factor"
        )
    for part in ("class_embedder", "spatial_rescaler"):
        if part in model.parts:
            faults.append(
                f"{part}: diffusers has no such network; give 'parts=[unet,autoencoder]' to leave it out, or format=compvis"
            )
    several = len(model.parts) > 1
    values: dict[str, dict[str, Any]] = {}
    for part in set(model.parts) & set(FOLDERS):
        try:
            values[part] = _values_of(model, part)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return {
        part: (
            FOLDERS[part] if several else "",
            "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors",
            values[part],
            {},
        )
        for part in model.parts
    }


def _as_stored(model: Model, values: dict[str, Any]) -> dict[str, Any]:
    """config.json as the source had it; only a scale that it left open, and the user gave, is filled in."""
    if "scaling_factor" in values and values["scaling_factor"] is None:
        return values | {"scaling_factor": model.factor}
    return values


def _values_of(model: Model, part: str) -> dict[str, Any]:
    if part == "unet":
        assert model.unet is not None
        return config_there.unet_values(model.unet, _sample_size(model))
    if part == "text_encoder":
        assert model.text_encoder is not None
        return config_there.text_values(model.text_encoder)
    assert model.autoencoder is not None
    if model.scale is None:
        log.warning(
            "the latent scale is not known, scaling_factor is null: import again with scale_factor=N if there is one"
        )
    size = (model.latent_size or 32) * model.autoencoder.factor
    return config_there.autoencoder_values(model.autoencoder, model.factor, size)


def _sample_size(model: Model) -> int | None:
    """What makes the pipeline draw latents of the trained size: LDMTextToImagePipeline takes f for 8."""
    size, first = model.latent_size, model.autoencoder
    if size is None or first is None or _pipeline(model)[0] != TEXT_PIPELINE or size * 8 % first.factor:
        return size
    return size * 8 // first.factor


def _write_component(
    part: Part, folder: Path, name: str, values: dict[str, Any], options: Mapping[str, Any], ema: bool
) -> None:
    write_json(folder / "config.json", values)
    slots = _slots(part.config, list(part.weights), values, bool(options.get("old_attention")))
    stem = name.removesuffix(".safetensors")
    if part.averaged is None:
        write_safetensors(folder / name, given(slots, part.weights) | part.head)
        return
    main, other = (part.averaged, part.weights) if ema else (part.weights, part.averaged)
    variant = RAW_BESIDE_AVERAGED if ema else AVERAGED_BESIDE_RAW
    write_safetensors(folder / name, given(slots, main) | part.head)
    write_safetensors(folder / f"{stem}.{variant}.safetensors", given(slots, other))


def _write_pipeline(model: Model, folder: Path, described: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
    """Scheduler, tokenizer and model_index.json."""
    source = model.source if model.source.get("format") == "diffusers" else {}
    if model.tokenizer is not None:
        shutil.copytree(model.tokenizer, folder / source.get("tokenizer", "tokenizer"))
    if source:
        scheduler = source.get("scheduler")
        if scheduler is not None:
            write_json(folder / scheduler["name"] / "scheduler_config.json", scheduler["config"])
        elif model.diffusion is not None:
            write_json(folder / "scheduler" / "scheduler_config.json", schedule_values(model.diffusion))
        if source["index"] is not None:
            write_json(folder / "model_index.json", source["index"])
        return
    if model.diffusion is not None:
        write_json(folder / "scheduler" / "scheduler_config.json", schedule_values(model.diffusion))
    pipeline, reason = _pipeline(model)
    if pipeline is None:
        if reason:
            log.warning("%s: its networks are written each in a folder, without a model_index.json", reason)
        return
    index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", "DDIMScheduler"]}
    for place, values in described.values():
        bert = "_class_name" not in values
        index[place] = ["latent_diffusion", "LDMBertModel"] if bert else ["diffusers", values["_class_name"]]
    if "text_encoder" in model.parts:
        index["tokenizer"] = ["transformers", "BertTokenizer"] if model.tokenizer else [None, None]
        if model.tokenizer is None:
            log.warning(
                "the model has no tokenizer: give one to from_pretrained(..., tokenizer=...), or import again with tokenizer="
            )
    write_json(folder / "model_index.json", index)


def _pipeline(model: Model) -> tuple[str | None, str]:
    """The pipeline that draws with this model; None where there is none, and the reason where one could be expected."""
    unet, text, first = model.unet, model.text_encoder, model.autoencoder
    if unet is None or first is None:
        return None, ""
    reason = "diffusers has no pipeline for its condition"
    if model.scale is None:
        reason = (
            "the latent scale is not known (import again with scale_factor=N, or config= of the checkpoint)"
        )
    elif model.diffusion is None:
        reason = (
            "the noise schedule is not known (import again with diffusion=NAME, or config= of the checkpoint)"
        )
    elif text is not None and text.max_tokens != PIPELINE_TOKENS:
        reason = f"LDMTextToImagePipeline has captions of {PIPELINE_TOKENS} tokens and this model of "
        reason += f"{text.max_tokens} (train with text_encoder.max_tokens={PIPELINE_TOKENS})"
    elif text is not None and unet.in_channels == unet.out_channels:
        return TEXT_PIPELINE, ""
    elif unet.context_dim is None and unet.in_channels == unet.out_channels and unet.num_classes is None:
        return "LDMPipeline", ""
    return None, reason
