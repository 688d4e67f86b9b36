"""Jobs and experiments resolve to the values that commit 1e24f73 prints (record_configs.py).

A key that is renamed, and a value that is changed on purpose, is entered below; an entry that nothing needs fails.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ldmscale.config import JOBS
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import MISSING, plain, read


class Change(NamedTuple):
    """A value that differs from 1e24f73."""

    configurations: Sequence[str]  # names in the record: "JOB" or "JOB EXPERIMENT"
    key: str  # of 1e24f73
    value: Any
    reason: str


# Dotted key of 1e24f73 -> the key that has its value now
RENAMED: dict[str, str] = {}
AUTOENCODERS = (
    "kl_f4",
    "kl_f8",
    "kl_f16",
    "kl_f32",
    "vq_f4",
    "vq_f4_noattn",
    "vq_f8",
    "vq_f8_n256",
    "vq_f16",
)
RECORD: dict[str, dict[str, Any]] = json.loads(
    lzma.decompress(Path(__file__).with_name("1e24f73_configs.json.xz").read_bytes())
)


def takes_zero3(name: str) -> bool:
    """Whether a recorded configuration shards weights, unless the experiment has chosen another stage since."""
    return RECORD[name].get("zero", {}).get("stage") == 3 and name != "diffusion ldm_text2img_1p45b"


CHANGED = [
    Change(
        ("evaluate", "latents"),
        "data.image_size",
        None,
        "inherited from the model that is read: its 256 px were silently other images for a model of another size",
    ),
    Change(
        (*(f"autoencoder autoencoder_{name}" for name in AUTOENCODERS), "diffusion ldm_superres_x4"),
        "data.crop",
        "random",
        "OpenImages is cropped at random, as published",
    ),
    Change(
        tuple(filter(takes_zero3, RECORD)),
        "zero.leaf_blocks",
        True,
        "at ZeRO-3 one gather per block takes a third of the host's time of one per layer; losses are equal",
    ),
    Change(
        ("diffusion ldm_text2img_1p45b",),
        "zero.stage",
        1,
        "on 8 GPUs of 80 GB, for which the experiment is, ZeRO-3 waits for the host",
    ),
    Change(("diffusion ldm_text2img_1p45b",), "unet.checkpointing", "off", "its activations fit into 80 GB"),
    Change(("diffusion ldm_text2img_1p45b",), "text_encoder.checkpointing", "off", "likewise"),
    Change(
        ("diffusion ldm_text2img_1p45b",),
        "train.rank_micro_batch",
        85,
        "one micro-batch per step on 8 GPUs, not five that are too small for the host",
    ),
    Change(
        ("diffusion ldm_bedrooms", "diffusion ldm_churches"),
        "data.flip",
        True,
        "LSUN is mirrored, as published",
    ),
]

# Mandatory values that are numbers; names and paths take any text.
NUMBERS = {
    "train.global_batch": 8,
    "train.rank_micro_batch": 4,
    "cluster.nodes": 1,
    "cluster.tasks_per_node": 1,
}
CHOICES = {"format": "diffusers"}


def dotted(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"optim.lr": 1.0e-4, ...}; an empty section is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= dotted(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = value
    return found


def typed_defaults(job: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of the job, those that the composed files leave at the default of their typed field among them."""

    def filled(part: Mapping[str, Any], path: str = "") -> dict[str, Any]:
        return {
            key: filled(value, f"{path}{key}.")
            if isinstance(value, Mapping)
            else (NUMBERS | CHOICES).get(path + key, "x")
            if value == MISSING
            else value
            for key, value in part.items()
        }

    return dotted(plain(read(JOBS[job], filled(values))))


def differences(name: str, *overrides: str) -> dict[str, tuple[Any, Any]]:
    """Keys of 1e24f73 whose values differ now, with both values; `name` is one of the record."""
    job, _, experiment = name.partition(" ")
    choice = [f"experiment={experiment}"] if experiment else []
    values = compose_job(job, [*choice, *overrides])
    now, then = dotted(values), dotted(RECORD[name])
    if {RENAMED.get(key, key) for key in then} - set(now):
        now = typed_defaults(job, values) | now
    return {
        key: (value, now.get(RENAMED.get(key, key), "absent"))
        for key, value in then.items()
        if now.get(RENAMED.get(key, key), "absent") != value
    }


@pytest.mark.parametrize("name", sorted(RECORD))
def test_a_configuration_has_the_values_of_1e24f73(name: str) -> None:
    changed = {change.key: change.value for change in CHANGED if name in change.configurations}
    found = differences(name)
    assert {key: (then, now) for key, (then, now) in found.items() if key not in changed} == {}
    assert {key: now for key, (_, now) in found.items()} == changed, "CHANGED lists what is not so"


def test_the_record_holds_every_job_and_experiment() -> None:
    names = [name.split(" ") for name in RECORD]
    assert {name[0] for name in names} == {"autoencoder", "diffusion", "doctor", "evaluate", "export", "import", "index",
                                           "latents", "quickstart", "sample", "submit", "wandb-sync"}  # fmt: skip
    # 34 experiments, and two of them are taken by both training jobs
    assert len({name[1] for name in names if len(name) == 2}) == 34
    assert len(names) == 12 + 36


def test_a_changed_value_and_a_lost_key_are_found() -> None:
    assert differences("diffusion text_small", "train.max_steps=7", "~ema.decay") == {
        "train.max_steps": (340, 7),
        "zero.leaf_blocks": (False, True),  # in CHANGED
        # What conf/ does not spell out has the default of its typed field.
        "ema.decay": (0.995, 0.9999),
    }
    assert "text_encoder.width" in differences("diffusion text_small", "text_encoder=null")
    assert differences("diffusion text_small", "unet.channels=32", "zero.leaf_blocks=false") == {
        "unet.channels": (64, 32)
    }


def test_every_entry_names_a_recorded_configuration_and_gives_its_reason() -> None:
    assert all(set(change.configurations) <= set(RECORD) and change.reason for change in CHANGED)
    assert set(RENAMED) <= {key for values in RECORD.values() for key in dotted(values)}
