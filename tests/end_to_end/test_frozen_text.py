"""Diffusion behind a frozen CLIP or T5 by the real commands: trained under ZeRO-3, resumed, loaded, drawn, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import text_folders
import torch
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

import ldmscale as library
from ldmscale.config import DiffusionJob
from ldmscale.config.checks import check
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import read
from ldmscale.errors import CheckpointError, ConfigError
from ldmscale.models.conditions import Conditions

pytestmark = pytest.mark.distributed

AUTOENCODER = [
    "autoencoder",
    "experiment=smoke",
    "run.dir=ae",
    "train.max_steps=1",
    "train.rank_micro_batch=8",
]
TRAIN = [
    "diffusion", "experiment=smoke", "data=shards", "data.shards='ae/data/*.tar'", "data.image_size=32", "data.workers=0",
    "first_stage.path=ae", "preview.sampler_steps=2", "preview.images=3", "preview.every_steps=4", "optim.lr=1e-2",
    "diffusion.caption_dropout=0.3",
]  # fmt: skip
SIZES = ["text_encoder.width=64", "text_encoder.max_tokens=16"]
CLIP = [*TRAIN, "text_encoder=clip_l", "text_encoder.path=clip", *SIZES]
T5 = [*TRAIN, "text_encoder=t5_xl", "text_encoder.path=t5", *SIZES, "diffusion.null_condition=learned"]
CAPTIONS = ["a red circle", "", "blue square"]
REFERENCE = {"clip": (CLIPTextModel, torch.float32), "t5": (T5EncoderModel, torch.bfloat16)}


def finished(done, status: int = 0):
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory, ldmscale) -> Path:
    """A run behind CLIP on two ranks under ZeRO-3 that was stopped half-way, and one behind T5 on one rank without ZeRO."""
    folder = tmp_path_factory.mktemp("frozen")
    for kind in ("clip", "t5"):
        text_folders.make(kind, folder / kind)
    finished(ldmscale(*AUTOENCODER, cwd=folder))
    finished(ldmscale(*CLIP, "run.dir=run_clip", "train.max_steps=2", cwd=folder, ranks=2))
    done = finished(ldmscale(*CLIP, "run.dir=run_clip", "train.max_steps=4", cwd=folder, ranks=2))
    assert "resumed from" in done.stderr
    alone = ["zero=0", "train.rank_micro_batch=4", "train.max_steps=4"]
    finished(ldmscale(*T5, *alone, "run.dir=run_t5", cwd=folder))
    return folder


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss/total"] for line in lines if "loss/total" in line]


def test_a_resumed_run_on_two_ranks_under_zero_3_is_the_straight_one_on_one_rank(place, ldmscale):
    alone = [
        "run.dir=alone",
        "zero=0",
        "train.rank_micro_batch=4",
        "train.max_steps=4",
        "preview.every_steps=0",
    ]
    finished(ldmscale(*CLIP, *alone, cwd=place))
    # The rate is high, so that few steps show a condition: it widens the rounding of other batches with each step.
    assert losses(place / "alone") == pytest.approx(losses(place / "run_clip"), rel=5e-5)
    assert (place / "run_clip" / "samples" / "step_00000004.png").exists()


def test_captions_that_are_encoded_once_give_the_losses_of_those_that_are_encoded_each_step(place, ldmscale):
    """On two ranks, stopped half-way with one prompt more; the trained model then reads any caption."""
    stored = [*CLIP, "run.dir=stored", "text_encoder.precompute=true"]
    finished(ldmscale(*stored, "train.max_steps=2", "preview.every_steps=0", cwd=place, ranks=2))
    folder = place / "stored" / "text_embeddings"
    before = np.load(folder / "tokens.npy")
    more = ["train.max_steps=4", "preview.prompts=[a purple hexagon]"]
    done = finished(ldmscale(*stored, *more, cwd=place, ranks=2))
    assert "encoded 1 distinct captions" in done.stderr
    assert losses(place / "stored") == pytest.approx(losses(place / "run_clip"), rel=5e-5)
    tokens, vectors = np.load(folder / "tokens.npy"), np.load(folder / "vectors.npy")
    assert np.array_equal(tokens[:-1], before) and len({row.tobytes() for row in tokens}) == len(tokens)
    theirs = CLIPTextModel.from_pretrained(place / "clip").eval()
    with torch.no_grad():
        context = theirs(input_ids=torch.from_numpy(tokens)).last_hidden_state
    assert float((context - torch.from_numpy(vectors)).abs().max()) < 1e-5
    parts = library.load(place / "stored")
    assert torch.equal(parts.text_encoder(torch.from_numpy(tokens)), context)
    # Another encoder does not add to what this one made, and what takes too much room is told.
    other = ["text_encoder.path=reseeded", "train.max_steps=5", "preview.prompts=[a green one]"]
    text_folders.make("clip", place / "reseeded", seed=1)
    assert "was made with the text encoder" in finished(ldmscale(*stored, *other, cwd=place), 2).stderr
    small = ["text_encoder.precompute_max_gib=1e-6", "run.dir=tight"]
    assert "give text_encoder.precompute=false" in finished(ldmscale(*stored, *small, cwd=place), 2).stderr


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_the_loaded_model_answers_as_the_u_net_does_to_the_context_of_transformers(place, kind):
    parts = library.load(place / f"run_{kind}")
    network, dtype = REFERENCE[kind]
    theirs = network.from_pretrained(place / kind, dtype=dtype).eval()
    words = AutoTokenizer.from_pretrained(place / kind)
    ids = words(CAPTIONS, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        context = theirs(input_ids=ids).last_hidden_state.float()
    assert torch.equal(torch.from_numpy(parts.tokenizer.encode(CAPTIONS)), ids)
    assert torch.equal(parts.text_encoder(ids), context)
    x, t = torch.randn(3, 4, 16, 16), torch.tensor([1, 400, 999])
    drop = torch.tensor([False, False, True])
    null = parts.denoiser.null_context() if kind == "t5" else context[1]  # the trained one; the empty caption
    context[2] = null
    with torch.no_grad():
        expected = parts.unet(x, t, context)
        found = parts.denoiser(x, t, Conditions(token_ids=ids), drop)
        assert float((found - expected).abs().max()) < 1e-5
        assert float((parts.unet(x, t, context.flip(0)) - expected).abs().max()) > 1e-4  # captions are read
    images = library.sample(
        parts, ["red circle", "blue"], steps=2, guidance=3.0, negative_prompts=["", "red"]
    )
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()


def test_the_command_draws_and_the_run_says_which_encoder_it_had(place, ldmscale):
    draw = ["sample", "sample.model=run_clip", "sample.prompts=[red circle,blue]", "sample.steps=2"]
    finished(ldmscale(*draw, "sample.out=drawn", cwd=place, ranks=2))
    assert len(list((place / "drawn").glob("0*.png"))) == 2
    noted = json.loads((place / "run_clip" / "run.json").read_text())["text_encoder"]
    assert noted["path"] == str(place / "clip")
    assert noted["digest"] == library.load(place / "run_clip").text_encoder.digest()
    done = finished(ldmscale("export", "src=run_clip", "dst=there", "format=diffusers", cwd=place), status=2)
    assert "not exported yet" in done.stderr


def test_another_encoder_is_refused_and_a_moved_one_is_not(place, ldmscale):
    text_folders.make("clip", place / "reseeded", seed=1)
    shutil.copytree(place / "clip", place / "moved")
    more = [
        *CLIP,
        "run.dir=alone",
        "zero=0",
        "train.rank_micro_batch=4",
        "preview.every_steps=0",
        "train.max_steps=5",
    ]
    done = ldmscale(*more, "text_encoder.path=reseeded", cwd=place)
    assert done.returncode != 0 and "the run began with the text encoder" in done.stderr
    finished(ldmscale(*more, "text_encoder.path=moved", cwd=place))
    library.load(place / "alone")
    shutil.copy(place / "reseeded" / "model.safetensors", place / "moved" / "model.safetensors")
    with pytest.raises(CheckpointError, match="was trained with the text encoder"):
        library.load(place / "alone")


def test_an_encoder_that_does_not_fit_is_told_before_anything_starts(place, monkeypatch):
    monkeypatch.chdir(place)

    def faults(*changed: str) -> str:
        return " ".join(check(read(DiffusionJob, compose_job("diffusion", [*CLIP[1:], *changed])), 2))

    assert faults() == ""
    told = faults("text_encoder.width=32")
    assert "give text_encoder.width=64 unet.context_dim=64" in told and "give unet.context_dim=32" in told
    assert "give text_encoder.max_tokens=16" in faults("text_encoder.max_tokens=77")
    assert "give text_encoder.kind=t5" in faults("text_encoder.path=t5")
    assert "has no config.json" in faults("text_encoder.path=ae")
    (place / "bare").mkdir()
    shutil.copy(place / "clip" / "config.json", place / "bare")
    told = faults("text_encoder.path=bare")
    assert "has no weights" in told and "has no tokenizer" in told
    with pytest.raises(ConfigError, match=r"text_encoder\.layers is unknown"):
        faults("+text_encoder.layers=3")
