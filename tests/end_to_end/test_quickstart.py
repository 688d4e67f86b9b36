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
    assert set(summary["cpu_seconds"]) == {"shards", "autoencoder", "latents", "diffusion", "scores"}
    assert all(seconds > 0 for seconds in summary["cpu_seconds"].values())
    again = ldmscale(*command, cwd=tmp_path)
    assert again.returncode == 0 and "has finished" in again.stderr and "PSNR" in again.stderr
    # Other scores and a longer stage 3 resume it; what was spent before counts.
    longer = [
        word.replace('"train.max_steps=3","train.g', '"train.max_steps=4","train.g') for word in command
    ]
    more = ldmscale(*longer, "score.guidance=2", cwd=tmp_path)
    assert more.returncode == 0, more.stderr[-6000:]
    assert "resuming with a change: score.guidance was 3.0, is 2.0" in more.stderr
    later = json.loads((run / "summary.json").read_text())
    assert later["sampler"]["guidance"] == 2
    for name in ("seconds", "cpu_seconds"):
        assert all(later[name][part] >= spent for part, spent in summary[name].items()), name
    assert later["seconds"]["total"] == pytest.approx(
        sum(value for part, value in later["seconds"].items() if part != "total")
    )
    assert json.loads((run / "run.json").read_text())["finished_step"] == 4
    shorter = ldmscale(*longer, 'overrides.autoencoder=["train.max_steps=4"]', cwd=tmp_path)
    assert shorter.returncode == 2 and "overrides.autoencoder=" in shorter.stderr
