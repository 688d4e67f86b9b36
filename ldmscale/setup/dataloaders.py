"""The data of a training run: its training samples, the images of previews, the held-out set."""

from __future__ import annotations

from pathlib import Path

from ldmscale.builders.feature_networks import open_features
from ldmscale.config import DiffusionJob, TrainingJob
from ldmscale.data.loading.loader import Batch, Loader, MakeItem
from ldmscale.data.loading.skipped_samples import Ledger
from ldmscale.data.loading.training_data import BadDataLimit, TrainingData, fixed_batch
from ldmscale.data.loading.transforms import ImageItem, LatentItem
from ldmscale.data.shards.urls import local_path
from ldmscale.diffusion.sample_latents import SamplerOptions
from ldmscale.errors import DataError
from ldmscale.setup.index import open_index
from ldmscale.setup.run import Run
from ldmscale.stages.first_stage import FirstStage
from ldmscale.stages.validation import FeatureNetwork, GenerationFigures, HeldOut


def training_data(run: Run, config: TrainingJob, make_item: MakeItem) -> TrainingData:
    """The samples that the run trains on."""
    data = config.data
    return TrainingData(
        run.index,
        make_item,
        run.ranks,
        seed=config.seed,
        global_batch=config.train.global_batch,
        rank_micro_batch=config.train.rank_micro_batch,
        block_shards=data.shuffle_block_shards,
        workers=data.workers,
        pin_memory=run.device.type == "cuda",
        ledger=Ledger(run.folder.ledger, run.ranks.rank),
        limit=BadDataLimit(data.max_bad_share, data.max_bad_in_a_row),
    )


def preview_batch(run: Run, config: TrainingJob, make_item: MakeItem) -> Batch:
    """The fixed samples of previews, the same on every rank: from the held-out shards, else from the training shards."""
    index = run.index
    if config.data.heldout_shards is not None:
        index = open_index(config.data.heldout_shards, config.data, run.ranks)
    return fixed_batch(index, make_item, min(config.preview.images, index.total))


def held_out(run: Run, config: DiffusionJob, make_item: MakeItem) -> HeldOut | None:
    """This rank's share of the samples that the validation loss is measured on; None where it is not asked for."""
    chosen = config.validation
    if not chosen.every_steps:
        return None
    batches, samples = _held_out_batches(
        run, config, make_item, chosen.samples, config.train.rank_micro_batch
    )
    return HeldOut(batches, samples, chosen.timestep_bins)


def generation_figures(
    run: Run, config: DiffusionJob, make_item: MakeItem, first_stage: FirstStage
) -> GenerationFigures | None:
    """What the figures of drawn images need on this rank; None where they are not asked for. Collective."""
    chosen = config.generation
    if not chosen.every_steps:
        return None
    network = open_features(
        chosen.features, chosen.features_weights, chosen.features_weights_sha256, run.device,
        key="generation.features",
    )  # fmt: skip
    assert network is not None
    run.note("generation_features", {"name": chosen.features, "sha256": network.sha256})
    batches, samples = _held_out_batches(run, config, make_item, chosen.samples, chosen.rank_batch)
    sampler = SamplerOptions(chosen.sampler_steps, chosen.guidance, prediction=config.diffusion.prediction)
    named = FeatureNetwork(network.distance, network.width, network)
    return GenerationFigures(batches, samples, named, sampler, chosen.seed, first_stage)


def _held_out_batches(
    run: Run, config: DiffusionJob, make_item: MakeItem, wanted: int, size: int
) -> tuple[list[Batch], int]:
    """This rank's micro-batches of `size`, as many as every rank has, and how many of their positions are no padding."""
    assert config.data.heldout_shards is not None
    index = open_index(config.data.heldout_shards, config.data, run.ranks)
    samples = min(wanted, index.total)
    passes = -(-samples // (size * run.ranks.size))
    loader = Loader(
        index, _held_out_item(config, index.shards[0], make_item), seed=0, rank=run.ranks.rank, world=run.ranks.size,
        global_batch=passes * size * run.ranks.size, rank_micro_batch=size,
    )  # fmt: skip
    batches = [next(loader) for _ in range(passes)]
    loader.close()
    return batches, samples


def _held_out_item(config: DiffusionJob, shard: str, make_item: MakeItem) -> MakeItem:
    """A run on latents may be measured on held-out images, too, which are then encoded as the latents were.

    Raises DataError where it has no autoencoder to encode them.
    """
    if not isinstance(make_item, LatentItem) or (Path(local_path(shard)).parent / "manifest.json").is_file():
        return make_item
    if config.first_stage.path is None:
        raise DataError(
            f"data.heldout_shards: {shard} holds no latents (there is no manifest.json beside it), and without "
            "first_stage.path images cannot be encoded: give shards of latents, or the autoencoder"
        )
    return ImageItem(
        make_item.format.shape[1] * config.autoencoder.factor,
        seed=0,
        max_pixels=config.data.max_pixels,
        caption_source=make_item.caption_source,
        tokenizer=make_item.tokenizer,
        decoder=config.data.decoder,
        labels=make_item.labels,
    )
