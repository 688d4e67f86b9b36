"""Stage 3: train the U-Net and what reads its conditions to denoise latents of images (paper, eq. 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmscale.data.loading.draws import Draws
from ldmscale.diffusion import process
from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.diffusion.sample_latents import SamplerOptions, draw_latents, starting_noise
from ldmscale.distributed import rng as draws
from ldmscale.distributed.collectives import gather_lists
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import CheckpointError
from ldmscale.models.conditions import Conditions
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.evaluation_mode import evaluation_mode
from ldmscale.models.layers import has_dropout
from ldmscale.models.text_encoder import FrozenTextEncoder
from ldmscale.stages.first_stage import FirstStage, batch_conditions
from ldmscale.stages.objective import ObjectiveOptions, add_noise, denoising_loss
from ldmscale.stages.validation import GenerationFigures, HeldOut, held_out_loss
from ldmscale.tracking.images import on_equal_canvas, to_uint8
from ldmscale.tracking.metrics import Metric
from ldmscale.train.engine.ema import Averages, ShardedEma, main_average
from ldmscale.train.engine.engine import Engine
from ldmscale.train.stage import Batch, Picture


@dataclass(frozen=True)
class PreviewGroup:
    """The preview images of one shape."""

    titles: tuple[str, ...]  # captions of the images, empty where there are none
    conditions: Conditions  # of as many samples
    latent_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Preview:
    """The images that are sampled while training, always from the same conditions and seeds."""

    groups: tuple[PreviewGroup, ...]
    first_seed: int  # of the first image; each further one has the next
    sampler: SamplerOptions


class DiffusionStage:
    """Trains "denoiser": the U-Net and what reads its conditions in one engine, so that one forward covers all."""

    def __init__(
        self,
        denoiser: Engine,
        *,
        averages: Sequence[ShardedEma],
        first_stage: FirstStage,
        latent_shapes: Sequence[tuple[int, int, int]],
        schedule: NoiseSchedule,
        objective: ObjectiveOptions,
        seed: int,
        ranks: Ranks,
        preview: Preview | None = None,
        held_out: HeldOut | None = None,
        generation: GenerationFigures | None = None,
    ) -> None:
        self.preview, self.held_out, self.generation = preview, held_out, generation
        self.engines = {"denoiser": denoiser}
        self.averages: Averages = {"denoiser": averages}
        # Of each aspect-ratio bucket, the square's first; one without buckets.
        self.first_stage, self.latent_shapes = first_stage, tuple(latent_shapes)
        self.schedule, self.objective = schedule, objective
        self.seed, self.ranks, self.device = seed, ranks, first_stage.device
        schedule.on(self.device)  # copied here, and not in the first micro-step
        self._dropout = has_dropout(self._denoiser)
        text_encoder = self._denoiser.reads_text
        self._text_digest = text_encoder.digest() if isinstance(text_encoder, FrozenTextEncoder) else None

    @property
    def _denoiser(self) -> Denoiser:
        network = self.engines["denoiser"].network
        assert isinstance(network, Denoiser)
        return network

    def active(self, step: int) -> Sequence[str]:
        return ("denoiser",)

    def micro_step(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Metric]]:
        engine = self.engines["denoiser"]
        drawn, objective = Draws.of(batch, self.seed), self.objective
        positions = drawn.positions
        x0 = self.first_stage.batch_latents(batch, self.seed)  # [B,C,h,w]
        noisy = add_noise(objective, self.schedule, x0, positions, self.seed, drawn=drawn)
        uniform = drawn.uniform("drop").to(self.device, non_blocking=True)
        conditions = batch_conditions(batch, self.first_stage).to(self.device)
        dropped = None
        if self._denoiser.has_null:
            dropped = process.drop_mask(uniform, objective.caption_dropout)
        drop_spatial = None
        if objective.spatial_dropout:
            rate = objective.caption_dropout if self._denoiser.has_null else 0.0
            drop_spatial = process.spatial_drop_mask(uniform, rate, objective.spatial_dropout)
        if self._dropout:
            draws.seed_torch(self.seed, positions[0], "dropout")
        output = engine(noisy.x_t.to(engine.compute_dtype), noisy.t, conditions, dropped, drop_spatial)
        loss, measured = denoising_loss(objective, self.schedule, noisy, output)
        engine.backward(loss)
        if drop_spatial is not None:
            measured = measured | {"spatial/dropped": drop_spatial.float().mean()}
        if dropped is not None:  # without a null condition nothing is dropped
            measured = measured | {"text/dropped": dropped.float().mean()}
        return loss.detach(), measured

    @torch.no_grad()
    def answer(self, batch: Batch) -> Tensor:
        engine, positions = self.engines["denoiser"], batch["position"].tolist()
        noisy = add_noise(
            self.objective,
            self.schedule,
            self.first_stage.batch_latents(batch, self.seed),
            positions,
            self.seed,
        )
        conditions = batch_conditions(batch, self.first_stage).to(self.device)
        kept = torch.zeros(len(positions), dtype=torch.bool, device=self.device)
        denoiser = self._denoiser
        with evaluation_mode(denoiser):
            output = denoiser(
                noisy.x_t.to(engine.compute_dtype), noisy.t, conditions, kept if denoiser.has_null else None
            )
        assert isinstance(output, Tensor)
        return output

    def pictures(self) -> Iterator[Picture]:
        preview = self.preview
        if preview is None:
            return
        images, first_seed = [], preview.first_seed
        for group in preview.groups:
            images += self._sampled(group, first_seed, preview.sampler)
            first_seed += len(group.titles)
        titles = tuple(title for group in preview.groups for title in group.titles)
        yield Picture("samples", on_equal_canvas(images), titles)

    def _sampled(self, group: PreviewGroup, first_seed: int, sampler: SamplerOptions) -> list[np.ndarray]:
        """The images of a group, uint8 [H,W,3] each, on every rank. Collective."""
        engine = self.engines["denoiser"]
        # Equal shares, padded with the last prompt: ranks that call a sharded network unequally often hang.
        count = len(group.titles)
        share = -(-count // self.ranks.size)
        mine = [min(self.ranks.rank * share + i, count - 1) for i in range(share)]
        seeds = [first_seed + i for i in mine]
        average = main_average(self.averages, "denoiser")
        with torch.no_grad(), evaluation_mode(self._denoiser), engine.averaged_weights(average):
            latents = draw_latents(
                self._denoiser,
                group.conditions.changed(lambda part: part[mine]).to(self.device),
                starting_noise(seeds, group.latent_shape).to(self.device),
                self.schedule,
                sampler,
                engine.compute_dtype,
                seeds,
            )
        return gather_lists(list(to_uint8(self.first_stage.images(latents))))[:count]

    def validate(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        return held_out_loss(
            self.held_out,
            self.engines["denoiser"],
            self.averages["denoiser"],
            self.first_stage,
            self.schedule,
            self.objective.prediction,
            self.device,
        )

    def generate(self) -> dict[str, float]:
        if self.generation is None:
            return {}
        engine = self.engines["denoiser"]
        with engine.averaged_weights(main_average(self.averages, "denoiser")):
            return self.generation.measure(self._denoiser, self.schedule, engine.compute_dtype)

    def finish(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {
            "latent_scale": self.first_stage.scale.plain(),
            "latent_shape": list(self.latent_shapes[0]),
            **({"latent_shapes": list(map(list, self.latent_shapes))} if len(self.latent_shapes) > 1 else {}),
            "autoencoder": self.first_stage.digest,
            "text_encoder": self._text_digest,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Check that the pretrained networks are those that the run began with; nothing else is restored.

        Raises CheckpointError if one differs.
        """
        if state["autoencoder"] != self.first_stage.digest:
            raise CheckpointError(
                f"the run began with the autoencoder {state['autoencoder']}, and first_stage.path now holds "
                f"{self.first_stage.digest}: was it trained on? Give the autoencoder of before, or another run.name"
            )
        if state.get("text_encoder") != self._text_digest:
            raise CheckpointError(
                f"the run began with the text encoder {state.get('text_encoder')}, and text_encoder.path now holds "
                f"{self._text_digest}: give the encoder of before, or another run.name"
            )
