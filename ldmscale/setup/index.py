"""Opening the index of shards on all ranks: made where it is missing, once for each place that holds one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ldmscale.config import DataConfig, EmbeddingsConfig
from ldmscale.config.schema.data import WeightedShardsConfig
from ldmscale.data.conditions.annotations import GivenEmbeddings
from ldmscale.data.images.buckets import Shape, bucket_shapes
from ldmscale.data.latents.index import open_latents
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.mixture import Mixture, WeightedShards
from ldmscale.data.shards.selection import Selection
from ldmscale.distributed.collectives import barrier, from_main_rank
from ldmscale.distributed.environment import Ranks
from ldmscale.storage.object_store import Storage
from ldmscale.waiting import stoppable

Patterns = str | Sequence[str] | Sequence[WeightedShardsConfig]


def open_index(patterns: Patterns, data: DataConfig, ranks: Ranks, shapes: tuple[Shape, ...] = ()) -> Mixture:
    """The index of what `patterns` name and `data` selects, on every rank. Collective.

    `shapes` are the aspect-ratio buckets of images, in place of those that `data` describes.

    Rank 0 looks through shards that have no index yet. The index of remote or read-only shards is in a cache folder,
    which another node may not share: there the node's first rank does it again.

    Raises DataError, on all ranks, for shards that are missing or have changed.
    """

    def open_sets(build_missing: bool) -> Mixture:
        return Mixture.open(
            sets_of(patterns),
            build_missing=build_missing,
            allow_pipe=data.allow_pipe,
            selection=replace(selection_of(data), shapes=shapes) if shapes else selection_of(data),
            storage=storage_of(data),
            open_set=open_latents if data.kind == "latents" else ShardIndex.open,
        )

    with stoppable():
        from_main_rank(lambda: open_sets(build_missing=True).fingerprint)
        if ranks.local_rank == 0 and not ranks.is_main:
            open_sets(build_missing=True)
    barrier()
    return open_sets(build_missing=False)


def sets_of(patterns: Patterns) -> list[WeightedShards]:
    """The sets of a mixture; patterns without weights are one set."""
    if isinstance(patterns, str):
        return [WeightedShards(patterns)]
    weighted = [entry for entry in patterns if isinstance(entry, WeightedShardsConfig)]
    if weighted:
        return [WeightedShards(entry.shards, entry.weight) for entry in weighted]
    return [WeightedShards([str(entry) for entry in patterns])]


def shapes_of(data: DataConfig) -> tuple[Shape, ...]:
    """(width, height) of the aspect-ratio buckets; none without data.bucket_step."""
    if data.bucket_step is None or data.image_size is None:
        return ()
    return bucket_shapes(data.image_size, data.bucket_step, data.bucket_max_ratio)


def selection_of(data: DataConfig) -> Selection:
    """Which samples are taken."""
    return Selection(
        filter=data.filter,
        min_caption_words=data.min_caption_words,
        max_caption_words=data.max_caption_words,
        min_image_side=data.min_image_side,
        shapes=shapes_of(data),
        caption_source=data.caption,
    )


def storage_of(data: DataConfig) -> Storage:
    """How remote shards are reached."""
    given = data.storage
    return Storage(given.options, given.endpoint, given.patience_seconds, given.request_seconds)


def embeddings_reader(given: EmbeddingsConfig | None) -> GivenEmbeddings | None:
    """Reads the embeddings of a sample; None for a model that reads none."""
    return None if given is None else GivenEmbeddings(given.member, given.width, given.max_tokens)
