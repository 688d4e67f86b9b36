"""CompVis checkpoints as models and back: .ckpt as Lightning writes them, and .safetensors with the same names.

Every tensor of a source has one place: a part, its averaged copy, the head over the vocabulary, or `kept` (loss
networks, schedule buffers and the like, by the patterns below). A tensor without a place is a fault.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmscale.builders.networks import build_autoencoder, build_text_encoder, build_unet
from ldmscale.config import ClassEmbedderConfig, SpatialConfig
from ldmscale.errors import ConfigError, DataError
from ldmscale.interop import compvis_names as names_there
from ldmscale.interop import compvis_shapes as shapes_there
from ldmscale.interop.compvis_config import MOST_TIMESTEPS, Hints, matches, schedule_of
from ldmscale.interop.limits import tensor_fault
from ldmscale.interop.model import Model, Part, PartConfig
from ldmscale.interop.tensors import Slot, faults_of, given, shapes_of, taken

log = logging.getLogger(__name__)

# What tensors of unexpected names and shapes make the search for an architecture raise.
UNFIT = (DataError, ValueError, IndexError, KeyError, TypeError, RuntimeError, ArithmeticError)
UNET, FIRST_STAGE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
TEXT = "cond_stage_model.transformer."
CLASSES, MAPPER = "cond_stage_model.embedding.weight", "cond_stage_model.channel_mapper.weight"
BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
    "scale_factor", "cond_ids",
)  # fmt: skip
# Tensors that are no part of a network here, and what they are.
KEPT = (
    (rf"({'|'.join(BUFFERS)})$", "buffers of the noise schedule and the latent scale"),
    (r"model_ema\.(decay|num_updates)$", "counters of the averaged weights"),
    (r"(first_stage_model\.|cond_stage_model\.)?loss\.", "loss networks of the autoencoder (discriminator, perceptual distance)"),
    (r"(first_stage_model\.)?colorize$", "colours of segmentation maps"),
    (r"(first_stage_model\.)?model_ema\.(loss|decay|num_updates)", "averaged loss networks"),
    (r"first_stage_model\.model_ema\.", "averaged weights inside the first stage"),
    (r"cond_stage_model\.(encoder|decoder|quantize|quant_conv|post_quant_conv|colorize)\b", "the first stage as condition"),
    (r"cond_stage_model\.(transformer\.text_model|model)\.", "a frozen CLIP text encoder"),
)  # fmt: skip


def from_state(state: Mapping[str, Tensor], hints: Hints) -> Model:
    """The model in a state dict of CompVis' names.

    Raises DataError with every tensor that is missing, unknown or of another shape, and with what `hints` lack.
    """
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise DataError(f"{name} is a {type(tensor).__name__}, expected a tensor: is this a state_dict?")
    faults = [fault for name, tensor in state.items() if (fault := tensor_fault(name, tensor))]
    if faults:
        raise DataError(faults)
    state = _completed(state)
    reader = _Reader(state, hints)
    if any(name.startswith(UNET) for name in state):
        reader.read_unet()
        if any(name.startswith(FIRST_STAGE + "encoder.") for name in state):
            reader.read_autoencoder(FIRST_STAGE)
        if any(name.startswith((TEXT + "token_emb.", TEXT + "attn_layers.")) for name in state):
            reader.read_text_encoder()
        reader.read_small_readers()
    elif any(name.startswith("encoder.") for name in state):
        reader.read_autoencoder("")
    else:
        raise DataError(
            f"no tensor is called {UNET}... or encoder...: expected a CompVis latent diffusion model or autoencoder, found "
            + (", ".join(list(state)[:3]) or "nothing")
        )
    return reader.finished()


def _completed(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A file that was cut down, as a whole one: averaged weights without raw ones get the names of these."""
    if any(name.startswith((UNET, "encoder.")) for name in state):
        return state
    if not any(name.startswith(EMA) for name in state):  # a first stage that was cut out of a whole model
        return {name.removeprefix(FIRST_STAGE): tensor for name, tensor in state.items()}
    raw = {
        UNET + there: name
        for name in state
        if name.startswith(EMA) and (there := names_there.unet_name_of_average(name[len(EMA) :])) is not None
    }
    if raw:
        log.warning("the checkpoint holds averaged weights of the U-Net alone: they are read as its weights")
    averages = set(raw.values())
    rest = {name: tensor for name, tensor in state.items() if name not in averages}
    return rest | {there: state[name] for there, name in raw.items()}


class _Reader:
    def __init__(self, state: Mapping[str, Tensor], hints: Hints) -> None:
        self.state, self.hints = state, hints
        self.model = Model()
        self.faults: list[str] = []
        self.used: set[str] = set()
        self.unreadable: list[str] = []  # prefixes of parts whose architecture cannot be told

    def read_unet(self) -> None:
        found = self._below(UNET)
        heads, size = self.hints.heads, self.hints.head_channels
        unknown = heads is None and size is None
        try:
            # With one head any network can be laid out, compared and written back as it came, heads known or not.
            config = shapes_there.infer_unet(found, 1 if unknown else heads, size)
            config = replace(config, dropout=self.hints.dropout)
            with torch.device("meta"):
                shapes = shapes_of(build_unet(config))
        except UNFIT as error:
            self._unreadable(UNET, error)
            return
        if unknown:
            self.model.unknown["unet.heads"] = shapes_there.UNET_HEADS
        self._take(
            "unet", config, names_there.unet_slots(config, list(shapes)), shapes, UNET, "diffusion_model."
        )

    def read_autoencoder(self, prefix: str) -> None:
        try:
            config = shapes_there.infer_autoencoder(self._below(prefix))
            with torch.device("meta"):
                shapes = shapes_of(build_autoencoder(config))
        except UNFIT as error:
            self._unreadable(prefix, error)
            return
        slots = names_there.autoencoder_slots(config, list(shapes))
        self._take("autoencoder", config, slots, shapes, prefix, "" if prefix == "" else None)

    def read_text_encoder(self) -> None:
        found = self._below(TEXT)
        heads, size = self.hints.text_heads, self.hints.text_head_channels
        try:
            if heads is None and size is None and not shapes_there.has_bert_heads(found):
                heads, self.model.unknown["text_encoder.heads"] = 1, shapes_there.TEXT_HEADS
            config = shapes_there.infer_text_encoder(found, heads, size)
            with torch.device("meta"):
                shapes = shapes_of(build_text_encoder(config))
        except UNFIT as error:
            self._unreadable(TEXT, error)
            return
        nested = "attn_layers.layers.0.0.0.weight" in found
        self._take("text_encoder", config, names_there.text_slots(list(shapes), nested), shapes, TEXT, None)
        self.model.source["nested_norms"] = nested
        part = self.model.parts.get("text_encoder")
        for name in names_there.TEXT_HEAD:
            if name in found:
                self.used.add(TEXT + name)
                if part is not None:
                    part.head[name] = found[name]

    def read_small_readers(self) -> None:
        """The table of classes and the channel mapper of maps: one tensor each."""
        wrong = [
            f"{name} {list(self.state[name].shape)}: expected {axes} axes"
            for name, axes in ((CLASSES, (2,)), (MAPPER, (2, 3, 4)))
            if name in self.state and self.state[name].dim() not in axes
        ]
        if wrong:
            self.faults += wrong
            self.unreadable += [CLASSES, MAPPER]
            return
        if CLASSES in self.state:
            rows, width = self.state[CLASSES].shape
            null = bool(self.hints.null_class)
            config = ClassEmbedderConfig(classes=rows - int(null), width=width, null_class=null)
            self.model.parts["class_embedder"] = Part(config, {"embedding.weight": self.state[CLASSES]})
            self.model.class_names = self.hints.class_names
            self.used.add(CLASSES)
        if MAPPER in self.state:
            joined, classes = self.state[MAPPER].shape[:2]
            if self.hints.halvings is None:
                self.model.unknown["spatial_rescaler.halvings"] = shapes_there.HALVINGS
            spatial = SpatialConfig(
                kind="map", channels=joined, map_classes=classes, halvings=self.hints.halvings or 0
            )
            self.model.parts["spatial_rescaler"] = Part(
                spatial, {"channel_mapper.weight": self.state[MAPPER]}
            )
            self.used.add(MAPPER)

    def finished(self) -> Model:
        for name in self.state:
            if name in self.used or any(name.startswith(prefix) for prefix in self.unreadable):
                continue
            if any(re.match(pattern, name) for pattern, _ in KEPT):
                self.model.kept[name] = self.state[name]
            else:
                self.faults.append(f"{name} {list(self.state[name].shape)} is unknown")
        if "unet" in self.model.parts:
            self._settle_schedule()
        if self.faults:
            raise DataError(self.faults)
        self.model.latent_size = self.hints.latent_size
        return self.model

    def _below(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: t for name, t in self.state.items() if name.startswith(prefix)}

    def _unreadable(self, prefix: str, error: Exception) -> None:
        told = (
            error.faults if isinstance(error, DataError) else (f"the tensors fit no architecture: {error}",)
        )
        whole = [text if text.startswith(("unet.", "text_encoder.")) else f"{prefix}{text}" for text in told]
        self.faults += whole
        self.unreadable.append(prefix or "")

    def _take(
        self,
        part: str,
        config: PartConfig,
        slots: Sequence[Slot],
        shapes: Mapping[str, Sequence[int]],
        prefix: str,
        averaged_as: str | None,
    ) -> None:
        """`averaged_as` is what the names of averaged copies begin with, dots removed; None where there are none."""
        faults = faults_of(slots, shapes, self.state, prefix)
        self.used |= {prefix + slot.foreign for slot in slots}
        averaged: dict[str, Tensor] | None = None
        if averaged_as is not None:
            copies = [replace(s, foreign=names_there.ema_name(averaged_as + s.foreign)) for s in slots]
            if any(EMA + copy.foreign in self.state for copy in copies):
                faults += (wrong := faults_of(copies, shapes, self.state, EMA))
                self.used |= {EMA + copy.foreign for copy in copies}
                averaged = {} if wrong else taken(copies, self.state, EMA)
        self.faults += faults
        weights = {} if faults else taken(slots, self.state, prefix)
        self.model.parts[part] = Part(config, weights, averaged)

    def _settle_schedule(self) -> None:
        model, betas = self.model, self.state.get("betas")
        model.diffusion = self.hints.diffusion
        if betas is not None and not (
            betas.dim() == 1 and 1 <= len(betas) <= MOST_TIMESTEPS and betas.is_floating_point()
        ):
            self.faults.append(
                f"betas {list(betas.shape)} of {betas.dtype}: expected up to {MOST_TIMESTEPS:,} floating-point numbers"
            )
            betas = None
        if (stored := self.state.get("scale_factor")) is not None and stored.numel() != 1:
            self.faults.append(f"scale_factor {list(stored.shape)}: expected one number")
            return
        if betas is not None:
            told = model.diffusion
            model.diffusion = told or schedule_of(betas)
            if told is not None and not (
                len(betas) == told.timesteps and matches(betas, told.schedule, told.beta_start, told.beta_end)
            ):
                self.faults.append(
                    f"betas are not those of the given configuration ({told.schedule} {told.beta_start} to {told.beta_end} in "
                    f"{told.timesteps} steps): give diffusion= or config= of this checkpoint"
                )
        factor = self.hints.scale_factor
        if "scale_factor" in self.state:
            factor = float(self.state["scale_factor"])
        if factor is not None:
            model.scale_by(factor)


def unwritable(model: Model) -> list[str]:
    """What of this model CompVis' checkpoints have no place for."""
    faults = []
    for name, config in (("unet", model.unet), ("autoencoder", model.autoencoder)):
        if config is not None and config.norm_groups != 32:
            faults.append(
                f"{name}.norm_groups={config.norm_groups}: CompVis' normalisations have 32 groups, always; give "
                f"format=diffusers, or train with {name}.norm_groups=32"
            )
    if (unet := model.unet) is not None and any(m != int(m) for m in unet.channel_mult):
        faults.append(
            f"unet.channel_mult={list(unet.channel_mult)}: CompVis' are whole numbers; give format=diffusers"
        )
    if (first := model.autoencoder) is not None and any(m != int(m) for m in first.channel_mult):
        faults.append(
            f"autoencoder.channel_mult={list(first.channel_mult)}: CompVis' are whole numbers; give format=diffusers"
        )
    if model.learned_null:
        faults.append(
            "diffusion.null_condition=learned: CompVis' null condition is the empty caption; train with "
            "diffusion.null_condition=tokens"
        )
    if model.scale is not None and model.factor is None:
        faults.append(
            "first_stage.scale=channel: CompVis' latents have one factor, not one per channel; train with "
            "first_stage.scale=factor"
        )
    if model.diffusion is not None and model.diffusion.prediction not in ("eps", "x0"):
        faults.append(
            f"diffusion.prediction={model.diffusion.prediction}: CompVis knows eps and x0; give format=diffusers, "
            "or train with diffusion=eps"
        )
    if model.diffusion is not None and model.diffusion.zero_terminal_snr:
        faults.append(
            "diffusion.zero_terminal_snr=true: CompVis' schedules keep some signal; give format=diffusers, or train "
            "with diffusion.zero_terminal_snr=false"
        )
    readers = [n for n in ("text_encoder", "class_embedder", "spatial_rescaler") if n in model.parts]
    if len(readers) > 1:
        faults.append(
            f"{' and '.join(readers)}: CompVis' models have one network that reads the condition; "
            "'parts=[unet,autoencoder]' leaves them out"
        )
    if "unet" not in model.parts and (alone := sorted(set(model.parts) - {"autoencoder"})):
        faults.append(
            f"{', '.join(alone)} without a U-Net: CompVis' checkpoints have none alone; give parts= with "
            "the U-Net"
        )
    return faults


def to_state(model: Model) -> dict[str, Tensor]:
    """The state dict of CompVis' names. Raises ConfigError naming everything that it has no place for."""
    if faults := unwritable(model):
        raise ConfigError(faults)
    state: dict[str, Tensor] = {}
    for name, part in model.parts.items():
        names = list(part.weights)
        if name == "unet":
            assert model.unet is not None
            slots, prefix, averaged_as = names_there.unet_slots(model.unet, names), UNET, "diffusion_model."
        elif name == "autoencoder":
            assert model.autoencoder is not None
            slots = names_there.autoencoder_slots(model.autoencoder, names)
            prefix, averaged_as = (FIRST_STAGE, "") if "unet" in model.parts else ("", "")
        elif name in ("class_embedder", "spatial_rescaler"):
            slots, prefix, averaged_as = [Slot(n, (n,)) for n in names], "cond_stage_model.", ""
        else:
            slots = names_there.text_slots(names, bool(model.source.get("nested_norms")))
            prefix, averaged_as = TEXT, ""
        state |= given(slots, part.weights, prefix)
        state |= {prefix + key: tensor for key, tensor in part.head.items()}
        if part.averaged is not None:
            copies = [replace(s, foreign=names_there.ema_name(averaged_as + s.foreign)) for s in slots]
            state |= given(copies, part.averaged, EMA)
    return state | model.kept


def kinds_kept(model: Model) -> dict[str, int]:
    """What was kept: descriptions, and how many tensors of each."""
    counted: dict[str, int] = {}
    for name in model.kept:
        what = next(text for pattern, text in KEPT if re.match(pattern, name))
        counted[what] = counted.get(what, 0) + 1
    return counted


def remainder(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of a .ckpt but its state_dict."""
    return {key: value for key, value in checkpoint.items() if key != "state_dict"}


def find_state(checkpoint: Mapping[str, Any], path: Path) -> Mapping[str, Tensor]:
    """The state_dict of a .ckpt, or the .ckpt itself where it is one. Raises DataError where there is none."""
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise DataError(
            f"{path} has no state_dict: it holds {', '.join(map(str, list(checkpoint)[:8])) or 'nothing'}"
        )
    return state
