"""Each task of the paper by the real commands on two gloo ranks: data, training, resume, sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ldmscale as library
from ldmscale.checkpoint.manager import newest_checkpoint
from ldmscale.checkpoint.shards import Reader
from ldmscale.errors import ConfigError

pytestmark = pytest.mark.distributed

TRAIN = [
    "diffusion", "experiment=smoke", "data=latents", "data.workers=0", "data.shards='latents/*.tar'", "first_stage.path=ae",
    "preview.sampler_steps=2", "preview.images=3", "preview.every_steps=4", "checkpoint.save_every_steps=2", "optim.lr=1e-2",
]  # fmt: skip
TASKS = {
    "text": [],
    "unconditional": ["text_encoder=null", "unet.context_dim=null"],
    "pixels": [
        "text_encoder=null", "unet.context_dim=null", "data=shards", "data.shards='ae/data/*.tar'", "data.image_size=32",
        "autoencoder=pixels", "first_stage.path=null", "unet.in_channels=3", "unet.out_channels=3",
    ],
    "class": [
        "text_encoder=null", "class_embedder=found", "class_embedder.classes=5", "class_embedder.width=64", "data.label=json:class",
    ],
}  # fmt: skip
PROMPTS = {
    "text": "[a red circle,a blue square]",
    "unconditional": "[one,two]",
    "pixels": "[one,two]",
    "class": "[triangle,circle,square]",
}


def finished(done):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def place(small_place: Any) -> Path:
    """A folder with latents, whose json tells each picture's shape; and both tasks, trained, resumed and drawn."""
    place = small_place
    latents = ["latents", "data=shards", "data.shards='ae/data/*.tar'", "data.image_size=32"]
    place.run(*latents, "first_stage.path=ae", "latents.path=latents")
    for task, told in TASKS.items():
        for steps in (2, 4):
            place.run(*TRAIN, *told, f"run.dir={task}", f"train.max_steps={steps}", ranks=2)
        draw = ["sample", f"sample.model={task}", f"sample.prompts={PROMPTS[task]}", "sample.steps=3"]
        place.run(*draw, f"sample.out={task}_drawn", ranks=2)
        assert "resumed from" in (place.folder / task / "logs" / "rank_00000.log").read_text()
    return place.folder


@pytest.mark.parametrize("task", TASKS)
def test_a_task_trains_resumes_and_draws(place, task):
    lines = [json.loads(line) for line in (place / task / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/total" in line] == [1, 2, 3, 4]
    with Image.open(place / task / "samples" / "step_00000004.png") as picture:
        assert picture.width > 32
    assert len(list((place / f"{task}_drawn").glob("0*.png"))) == len(PROMPTS[task].split(","))
    assert (place / task / "tokenizer").exists() == (task == "text")


def test_one_autoencoder_and_latents_made_once_serve_all_of_them(place):
    """Tasks with maps, small images and holes, online behind the same autoencoder, are in test_file_tasks.py."""
    made_by = json.loads((place / "latents" / "manifest.json").read_text())["format"]["autoencoder"]
    for task in ("text", "unconditional", "class"):
        reader = Reader(newest_checkpoint(place / task / "checkpoints"))
        assert reader.state["stage"]["autoencoder"] == made_by


def test_a_model_of_pixels_needs_no_first_stage_and_gets_none(place, ldmscale):
    parts = library.load(place / "pixels")
    assert parts.latent_shape == (3, 32, 32) and parts.autoencoder is not None
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(parts.autoencoder.decode(parts.autoencoder.encode(image).latent), image)
    kept = torch.zeros(1, 1, 32, 32)
    kept[..., 16:] = 1
    drawn = library.sample(parts, [""], steps=2, guidance=1.0, image=image, mask=kept)
    assert torch.equal(drawn[..., :16], image[..., :16])
    refused = ldmscale("export", "src=pixels", "dst=pixels.ckpt", "format=compvis", cwd=place)
    assert refused.returncode == 2 and "works on pixels" in refused.stderr
    wrong = ldmscale(*TRAIN, *TASKS["pixels"], "first_stage.path=ae", "data.kind=latents", cwd=place)
    assert wrong.returncode == 2
    assert "give first_stage.path=null" in wrong.stderr and "give data=shards" in wrong.stderr
    trained = ldmscale("autoencoder", "experiment=smoke", "autoencoder=pixels", cwd=place)
    assert trained.returncode == 2 and "there is nothing to train" in trained.stderr


def test_the_classes_that_were_found_are_kept_with_the_run(place):
    parts = library.load(place / "class")
    assert parts.classes is not None and parts.classes.names == ("circle", "square", "triangle")
    assert parts.class_embedder is not None and parts.class_embedder.embedding.weight.shape == (6, 64)


def test_a_class_conditional_run_is_exported_with_its_null_class_and_draws_the_same(place, ldmscale):
    finished(ldmscale("export", "src=class", "dst=class.ckpt", "format=compvis", cwd=place))
    refused = ldmscale("export", "src=class", "dst=there", "format=diffusers", cwd=place)
    assert refused.returncode == 2 and "class_embedder: diffusers has no such network" in refused.stderr
    run, exported = library.load(place / "class"), library.load(place / "class.ckpt")

    def draw(parts: library.Parts) -> torch.Tensor:
        return library.sample(parts, ["triangle", "circle"], steps=3, guidance=4.0)

    assert exported.denoiser is not None and exported.denoiser.has_null
    assert torch.equal(draw(exported), draw(run))
    # Names travel on, into the folder of an import and out of it again, and can be given to a model without them.
    finished(ldmscale("import", "src=class.ckpt", "dst=imported", cwd=place))
    assert torch.equal(draw(library.load(place / "imported")), draw(run))
    finished(ldmscale("export", "src=imported", "dst=again.safetensors", "format=compvis", cwd=place))
    assert library.load(place / "again.safetensors").classes == library.load(place / "imported").classes
    (place / "names.txt").write_text("round\nangular\n")
    other = ["class_embedder.classes=5", "class_embedder.width=64", "class_embedder.names=names.txt"]
    finished(ldmscale("import", "src=class.ckpt", "dst=renamed", *other, cwd=place))
    renamed = library.load(place / "renamed")
    assert renamed.classes is not None and renamed.classes.names == ("round", "angular")
    named = [
        "sample",
        "sample.model=renamed",
        "sample.prompts=[angular]",
        "sample.steps=2",
        "sample.out=named",
    ]
    finished(ldmscale(*named, cwd=place))
    assert [file.name for file in (place / "named").glob("0*.png")] == ["000000_angular_0.png"]


def test_an_unconditional_run_whose_heads_diffusers_cannot_express_is_refused_by_name(place, ldmscale):
    refused = ldmscale("export", "src=unconditional", "dst=pipeline", "format=diffusers", cwd=place)
    assert refused.returncode == 2 and "unet.heads=2" in refused.stderr and not (place / "pipeline").exists()


def test_a_class_is_drawn_by_its_name_or_number_and_guided_by_the_null_class(place):
    parts = library.load(place / "class")

    def draw(prompt: str, guidance: float = 4.0) -> torch.Tensor:
        return library.sample(parts, [prompt], steps=3, seeds=[7], guidance=guidance)

    assert torch.equal(draw("triangle"), draw("2"))
    assert (draw("triangle") - draw("circle")).abs().max() > 1e-3
    assert (draw("triangle") - draw("triangle", 1.0)).abs().max() > 1e-3
    with pytest.raises(
        ConfigError, match="there is no class 'hexagon' among the 5 \\(circle, square, triangle"
    ):
        draw("hexagon")
    with pytest.raises(ConfigError, match="the label 5 is out of range"):
        draw("5")
