"""A diffusion model trains behind an autoencoder that diffusers saved, on latents and online, and is exported with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL

import ldmscale as library

pytestmark = pytest.mark.distributed

SMOKE = ["diffusion", "experiment=smoke", "data.workers=0", "train.max_steps=1", "preview.every_steps=0"]
LATENTS = [*SMOKE, "data=latents", "data.shards='latents/*.tar'"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, ldmscale) -> Path:
    """A folder with pictures as shards, and the smoke configuration's autoencoder as diffusers would have saved it."""
    folder = tmp_path_factory.mktemp("foreign")
    trained = [
        "autoencoder",
        "experiment=smoke",
        "run.dir=ae",
        "train.max_steps=1",
        "train.rank_micro_batch=8",
    ]
    finished(ldmscale(*trained, cwd=folder))
    finished(ldmscale("export", "src=ae", "dst=made", "format=diffusers", cwd=folder))
    there = AutoencoderKL.from_pretrained(folder / "made")
    there.register_to_config(scaling_factor=0.5)
    there.save_pretrained(folder / "first")
    return folder


def finished(done):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def test_latents_of_it_are_scaled_by_its_own_factor_or_as_measured(place, ldmscale):
    encode = ["latents", "data=shards", "data.shards='ae/data/*.tar'"]  # at the sample_size of first
    encoded = finished(ldmscale(*encode, "first_stage.path=first", "latents.path=latents", cwd=place))
    assert "latents of 4x8x8, images at 32 px, in latents" in encoded.stderr
    measured = json.loads((place / "latents" / "manifest.json").read_text())
    for name, told, factor in (("own", [], 0.5), ("channel", ["first_stage.scale=channel"], None)):
        finished(ldmscale(*LATENTS, "first_stage.path=first", *told, f"run.dir={name}", cwd=place))
        parts = library.load(place / name)
        expected = torch.full((4,), factor) if factor else 1 / torch.tensor(measured["channel_std"])
        assert torch.allclose(parts.scale.factor, expected), name
        assert library.sample(parts, ["a"], steps=2).shape == (1, 3, 32, 32)
    finished(ldmscale("export", "src=own", "dst=own.safetensors", "format=compvis", cwd=place))
    again = library.load(place / "own.safetensors").autoencoder.state_dict()
    first = library.load(place / "first").autoencoder.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_one_that_is_not_as_configured_or_has_no_scale_is_refused_and_a_given_factor_serves(place, ldmscale):
    online = [*SMOKE, "data=shards", "data.shards='ae/data/*.tar'", "data.image_size=32"]
    other = ldmscale(
        *online, "first_stage.path=first", "autoencoder.channel_mult=[1,2]", "run.dir=x", cwd=place
    )
    assert other.returncode == 2 and "the factor of the configured autoencoder is 2" in other.stderr
    assert not (place / "x").exists()
    sized = [*online, "data.image_size=64", "first_stage.path=first", "first_stage.scale=channel"]
    channel = ldmscale(*sized, "run.dir=y", cwd=place)
    warnings = [line for line in channel.stderr.splitlines() if "WARNING data.image_size=64" in line]
    assert len(warnings) == 1 and "was trained at 32 px" in warnings[0]
    assert channel.returncode == 2 and "give first_stage.fixed_factor=N" in channel.stderr
    # What the folder states is taken in place of what is configured.
    given = [
        "autoencoder.norm_groups=8",
        "autoencoder.blocks_per_level=3",
        "first_stage.path=first",
        "first_stage.fixed_factor=0.25",
        "run.dir=online",
    ]
    done = finished(ldmscale(*online, *given, cwd=place))
    stated = json.loads((place / "first" / "config.json").read_text())
    assert f"autoencoder.norm_groups is {stated['norm_num_groups']}, as" in done.stderr
    trained = yaml.safe_load((place / "online" / "config.yaml").read_text())["autoencoder"]
    assert trained["norm_groups"] == stated["norm_num_groups"]
    assert trained["blocks_per_level"] == stated["layers_per_block"]
    assert float(library.load(place / "online").scale.factor[0]) == 0.25
