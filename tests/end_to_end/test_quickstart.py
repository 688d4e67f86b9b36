"""`ldmscale quickstart` on a user's own folder of images, shortened: all files, all figures, and no second training."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytestmark = pytest.mark.distributed


def test_a_folder_of_images_goes_through_the_whole_pipeline(tmp_path, ldmscale):
    for colour in ("red", "green", "blue"):
        for shape in ("circle", "square"):
            for size in (10, 16, 22):
                image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
                pen = ImageDraw.Draw(image)
                box = (4, 4, 4 + size, 4 + size)
                (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=colour)
                (tmp_path / "images" / shape).mkdir(parents=True, exist_ok=True)
                image.save(tmp_path / "images" / shape / f"{colour}_{size}.png")
    command = [
        "quickstart", "data=folder", "data.root=images", "data.heldout_share=0.2", "score.sampler_steps=3", "score.grid_prompts=4",
        'overrides.autoencoder=["train.max_steps=3","loss.gan_start_step=1","preview.every_steps=0","loss.perceptual=none"]',
        'overrides.diffusion=["train.max_steps=3","train.global_batch=8","train.rank_micro_batch=4","preview.every_steps=0"]',
    ]  # fmt: skip
    done = ldmscale(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    run = tmp_path / "runs" / "quickstart"
    for name in ("config.yaml", "metrics.jsonl", "run.json", "summary.json", "samples/prompts.png", "checkpoints/latest",
                 "autoencoder/checkpoints/latest", "latents/manifest.json", "data/source.json"):  # fmt: skip
        assert (run / name).exists(), name
    summary = json.loads((run / "summary.json").read_text())
    assert summary["prompt_following"]["heldout"]["samples"] == 4
    assert summary["prompt_following"]["seen"]["class_chance"] == pytest.approx(0.5, abs=0.01)
    assert np.isfinite(summary["reconstruction"]["psnr_db"])
    assert set(summary["cpu_seconds"]) == {"autoencoder", "latents", "diffusion", "scores"}
    assert all(seconds > 0 for seconds in summary["cpu_seconds"].values())
    again = ldmscale(*command, cwd=tmp_path)
    assert again.returncode == 0 and "has finished" in again.stderr and "PSNR" in again.stderr
