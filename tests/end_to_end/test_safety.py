"""Samples that break the loss, by the real command: skipped, written down, and left behind after a return, exactly."""

import json

import numpy as np
import pytest

import ldmscale as library
from ldmscale.data.latents.format import LatentFormat
from ldmscale.data.latents.writer import LatentShardWriter, finish_set
from ldmscale.data.order.shuffle import Order

pytestmark = pytest.mark.distributed

SAMPLES = 128
BAD_POSITIONS = (10, 33, 44)  # of batches of 8: one step alone, then two in a row
COMMAND = [
    "diffusion", "experiment=smoke", "data=latents", "data.shards='latents/*.tar'", "data.workers=0", "data.image_size=null",
    "diffusion=v", "first_stage.fixed_factor=1", "checkpoint.save_every_steps=2", "safety.skips_before_rollback=2",
]  # fmt: skip


def write_latents(folder, bad):
    form = LatentFormat("made for this test", "latent", "float32", (4, 8, 8), {})
    draw = np.random.default_rng(0)
    with LatentShardWriter(folder, "0.tar", form) as writer:
        for key in range(SAMPLES):
            latent = draw.standard_normal((4, 8, 8)).astype(np.float32)
            # Finite, and so is the gradient; the loss, its square, is not.
            writer.write(f"{key:03d}", latent * 1e25 if key in bad else latent, "red circle", {})
    finish_set(folder, ["0.tar"], form)


@pytest.fixture(scope="module")
def place(tmp_path_factory, ldmscale):
    folder = tmp_path_factory.mktemp("safety")
    order = Order([SAMPLES], seed=0)
    bad = [order.sample_at(position)[-1] for position in BAD_POSITIONS]
    write_latents(folder / "latents", bad)
    straight = ldmscale(*COMMAND, "run.dir=straight", "train.max_steps=8", cwd=folder, ranks=2)
    assert straight.returncode == 0, straight.stderr[-6000:]
    return folder, [f"{key:03d}" for key in bad], straight.stderr


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bad_updates_are_skipped_written_down_and_left_behind(place):
    folder, bad, told = place
    first, second, third, back = lines(folder / "straight" / "skipped_steps.jsonl")
    assert [line["step"] for line in (first, second, third)] == [2, 5, 6]
    assert first["positions"] == [8, 16]
    for line, key in zip((first, second, third), bad, strict=True):
        culprits = [part for part in line["micro_batches"] if not isinstance(part["loss"], float)]
        assert len(culprits) == 1 and key in culprits[0]["keys"]
        assert len([k for part in line["micro_batches"] for k in part["keys"]]) == 8
    assert back == {"back_to_step": 4, "left_out": [32, 48]}
    metrics = lines(folder / "straight" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(
        range(1, 9)
    )  # the steps that were undone are not told twice
    assert [line["images_seen"] for line in metrics[4:]] == [56, 64, 72, 80]
    losses = [line.get("loss/total") for line in metrics]
    assert losses[1] is None and np.isfinite([loss for n, loss in enumerate(losses) if n != 1]).all()
    assert "is not finite" in told and "back at step 4" in told


def test_a_run_that_is_interrupted_amid_skipped_steps_goes_the_same_way(place, ldmscale):
    folder, _, _ = place
    for steps in (5, 8):
        done = ldmscale(
            *COMMAND, "run.dir=resumed", f"train.max_steps={steps}", "zero=0", "train.rank_micro_batch=4", "safety.dry_run=false",
            cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
    found, expected = (lines(folder / name / "metrics.jsonl") for name in ("resumed", "straight"))
    assert [line["images_seen"] for line in found] == [line["images_seen"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert ("loss/total" in one) == ("loss/total" in other)
        assert one.get("loss/total", 0) == pytest.approx(other.get("loss/total", 0), rel=2e-6)
    ours, theirs = (library.load(folder / name).denoiser.state_dict() for name in ("resumed", "straight"))
    for key, value in theirs.items():
        assert float((ours[key].double() - value.double()).abs().max()) < 1e-5, key
