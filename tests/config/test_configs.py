"""Every file in conf/ composes and validates, and every kind of bad configuration is refused with its remedy."""

from pathlib import Path

import pytest

from ldmscale.config import JOBS
from ldmscale.config.checks import check
from ldmscale.config.compose import compose_job
from ldmscale.config.folders import config_folder
from ldmscale.config.typed import read
from ldmscale.errors import ConfigError

FILES = sorted(config_folder().glob("*/*.yaml"))
# What a job must be told before it can run.
NEEDED = {
    "index": ["data.shards=x.tar"],
    "autoencoder": ["data.shards=x.tar", "train.global_batch=8", "train.rank_micro_batch=4", "loss.perceptual_weights=a",
                    "loss.perceptual_heads=b"],
    "latents": ["data.shards=x.tar", "first_stage.path=a", "latents.path=b"],
    "diffusion": ["data.shards=x.tar", "train.global_batch=8", "train.rank_micro_batch=4"],
    "evaluate": ["data.shards=x.tar", "evaluate.model=a"],
    "sample": ["sample.model=a", "sample.prompts=b"],
    "import": ["src=a", "dst=b"],
    "export": ["src=a", "dst=b", "format=diffusers"],
    "quickstart": [],
    "doctor": [],
    "wandb-sync": ["run.dir=a"],
    "submit": ["cluster.nodes=1", "cluster.tasks_per_node=1"],
}  # fmt: skip
# The job that a group's files belong to.
GROUP_JOB = {
    "autoencoder": "autoencoder", "loss": "autoencoder", "unet": "diffusion", "text_encoder": "diffusion",
    "diffusion": "diffusion", "optim": "diffusion", "zero": "diffusion", "train": "diffusion", "preview": "diffusion",
    "checkpoint": "diffusion", "tracking": "diffusion", "debug": "diffusion", "class_embedder": "diffusion",
    "embeddings": "diffusion", "layout": "diffusion", "spatial": "diffusion", "cluster": "submit", "safety": "diffusion",
}  # fmt: skip


def job_of(path: Path) -> str:
    if path.parent.name == "experiment":
        return "diffusion" if "/unet:" in path.read_text() else "autoencoder"
    if path.parent.name == "data":
        return "quickstart" if "source:" in path.read_text() else "index"
    return GROUP_JOB[path.parent.name]


def composed(job: str, *overrides: str):
    extra = [o for o in NEEDED[job] if not o.startswith("train.") or "experiment=" not in " ".join(overrides)]
    return read(JOBS[job], compose_job(job, [*extra, *overrides]))


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_file_composes_and_validates(path):
    job = job_of(path)
    extra = ["data.root=x"] if path.stem == "folder" else []
    name = path.stem.removesuffix(f"_{job}") if path.parent.name == "experiment" else path.stem
    config = composed(job, f"{path.parent.name}={name}", *extra)
    assert config.job == job


@pytest.mark.parametrize("job", sorted(JOBS))
def test_every_job_composes_with_its_defaults(job):
    assert composed(job).job == job


def test_a_group_file_is_what_its_name_says():
    config = composed("diffusion", "unet=text2img_1p45b", "zero=2")
    assert (config.unet.channels, config.unet.channel_mult, config.zero.stage) == (320, (1, 2, 4, 4), 2)


def test_the_published_text_to_image_run_validates_but_for_its_data(tmp_path):
    config = composed("diffusion", "experiment=ldm_text2img_1p45b")
    faults = check(config, world_size=8)
    assert [fault.split(":")[0] for fault in faults] == [
        "data.shards",
        "first_stage.path is not set, but preview.every_steps asks for pictures, which the autoencoder decodes",
    ]
    assert config.train.global_batch == 680
    # One micro-batch per step on each of 8 GPUs, and ZeRO-1, which has the least work for the host.
    assert config.train.rank_micro_batch * 8 == 680 and config.zero.stage == 1
    assert config.unet.checkpointing == config.text_encoder.checkpointing == "off"


@pytest.mark.parametrize("memory", ["train.rank_micro_batch=17", "zero=3"])
def test_the_published_text_to_image_run_takes_what_its_file_says_for_smaller_gpus(memory):
    faults = check(composed("diffusion", "experiment=ldm_text2img_1p45b", memory), world_size=8)
    assert not [fault for fault in faults if "zero" in fault or "micro_batch" in fault]


FAULTS = [
    ("diffusion", ["train.global_batch=9"], 2, "give train.global_batch=8 or 16"),
    ("diffusion", ["train.max_steps=0"], 1, "train.max_steps=0: expected at least 1"),
    ("diffusion", ["unet.context_dim=64"], 1, "give unet.context_dim=1280"),
    ("diffusion", ["unet.head_channels=32"], 1, "give exactly one of them"),
    ("diffusion", ["train.compile=blocks"], 1, "give zero=0, 1 or 2, or train.compile=off"),
    ("autoencoder", ["train.compile=blocks"], 1, "give zero=0, 1 or 2, or train.compile=off"),
    ("diffusion", ["train.compile=blocks", "train.attention=xformers"], 1, "give train.attention=sdpa"),
    ("diffusion", ["train.compile=blocks", "text_encoder.checkpointing=selective"], 1,
     "give text_encoder.checkpointing=full or off"),
    ("diffusion", ["unet.heads=7"], 1, "does not divide the 320 channels"),
    ("diffusion", ["unet.attention_levels=[0,4]"], 1, "this U-Net's levels are 0 to 3"),
    ("diffusion", ["unet.channels=100"], 1, "give unet.channels=96"),
    ("diffusion", ["unet.out_channels=3"], 1, "give unet.in_channels=4 unet.out_channels=4"),
    ("diffusion", ["data=shards"], 1, "images need an autoencoder"),
    ("diffusion", ["data.crop=random"], 1, "latents are one crop of an image"),
    ("diffusion", ["preview.sampler_steps=1000"], 1, "expected 1 to 999"),
    ("diffusion", ["generation.every_steps=5"], 1, "data.heldout_shards is not set, but generation.every_steps asks"),
    ("diffusion", ["generation.every_steps=5"], 1, "which the autoencoder decodes: give the folder of its run"),
    ("diffusion", ["generation.every_steps=5", "generation.sampler_steps=0"], 1, "expected 1 to 999"),
    ("diffusion", ["generation.every_steps=5", "generation.features_weights=x"], 1, "x: there is no such file"),
    ("diffusion", ["data.caption=xml"], 1, "expected txt or json:KEY"),
    ("diffusion", ["first_stage.path=nowhere"], 1, "nowhere is not a run folder"),
    ("autoencoder", ["data.image_size=250"], 1, "give data.image_size=256"),
    ("autoencoder", ["data.image_size=null"], 1, "give data.image_size=256"),
    ("autoencoder", ["data.kind=latents"], 1, "this job reads images"),
    ("autoencoder", ["autoencoder.kind=vq"], 1, "give autoencoder.codebook_size=8192"),
    ("autoencoder", ["autoencoder.codebook_size=5"], 1, "a kl autoencoder has no codebook"),
    ("autoencoder", [], 1, "give the path of the weights"),
    ("autoencoder", ["loss.perceptual_weights=null"], 1, "or give loss.perceptual=efficientnet_lite0 or none"),
    ("diffusion", ["diffusion.zero_terminal_snr=true"], 1, "give diffusion.prediction=v (or x0)"),
    ("diffusion", ["experiment=class_small", "class_embedder.names=absent.txt"], 1, "absent.txt: there is no such file"),
    ("diffusion", ["diffusion.weighting=min_snr", "diffusion.loss=l1"], 1, "give diffusion.loss=l2"),
    ("diffusion", ["diffusion.beta_start=0.5"], 1, "the published are 0.00085 and 0.012"),
    ("diffusion", ["diffusion.loss_bins=1001"], 1, "give as many at most"),
    ("diffusion", ["ema.decays=[0.99,0.99]"], 1, "ema.decays has 0.99 more than once"),
    ("diffusion", ["ema.decay=0.999", "ema.decays=[0.999]"], 1, "which is ema.decay"),
    ("diffusion", ["ema.power_widths=[0.05,0.05]"], 1, "ema.power_widths has 0.05 more than once"),
    ("autoencoder", ["ema.enabled=true", "ema.store_every_steps=10"], 1, "give ema.power_widths=[0.05,0.1]"),
    ("diffusion", ["ema.enabled=false", "ema.decays=[0.9]"], 1, "or ema.enabled=true"),
    ("diffusion", ["class_embedder=imagenet"], 1, "give text_encoder=null or class_embedder=null"),
    ("diffusion", ["text_encoder=null"], 1, "or unet.context_dim=null"),
    ("diffusion", ["text_encoder=null", "class_embedder=imagenet"], 1, "class_embedder.width=512: the U-Net attends"),
    ("diffusion", ["text_encoder=null", "class_embedder=imagenet", "class_embedder.null_class=false"], 1,
     "give diffusion.caption_dropout=0"),
    ("diffusion", ["layout=found"], 1, "no text_encoder reads it: give text_encoder=bert_layout"),
    ("diffusion", ["text_encoder=bert_layout"], 1, "give layout=found or layout=openimages"),
    ("diffusion", ["experiment=layout_small", "text_encoder.max_tokens=12"], 1, "text_encoder.max_tokens=11 for 3 objects"),
    ("diffusion", ["experiment=layout_small", "text_encoder.vocab_size=64"], 1, "give text_encoder.vocab_size=65 or more"),
    ("diffusion", ["data.boxes=boxes"], 1, "data.boxes='boxes': expected json:KEY"),
    ("diffusion", ["spatial=superres"], 1, "give unet.in_channels=7 unet.out_channels=4"),
    ("diffusion", ["spatial=superres", "spatial.channels=5"], 1, "give spatial.channels=3"),
    ("diffusion", ["spatial=inpainting"], 1, "give spatial.channels=5"),
    ("diffusion", ["spatial=semantic", "spatial.map_classes=null"], 1, "give spatial.map_classes=182"),
    ("diffusion", ["spatial=superres", "spatial.halvings=2"], 1, "or give spatial.kind=map"),
    ("diffusion", ["unet.in_channels=8"], 1, "give unet.in_channels=4 unet.out_channels=4"),
    ("diffusion", ["run.dir=s3://bucket/run"], 1, "give a path without ://"),
    ("diffusion", [f"run.dir={__file__}/run"], 1, "test_configs.py is a file; give a folder"),
    ("quickstart", [f"run.dir={__file__}/run"], 1, "test_configs.py is a file; give a folder"),
    ("latents", [f"latents.path={__file__}/set"], 1, "test_configs.py is a file; give a folder"),
    ("evaluate", [f"evaluate.out={__file__}/a/b.json"], 1, "test_configs.py is a file; give a folder"),
    ("export", [f"dst={__file__}/a"], 1, "test_configs.py is a file; give a folder"),
    ("index", ["data.caption=json:"], 1, "expected txt or json:KEY"),
    ("index", ["data.storage.endpoint=here"], 1, "expected a URL"),
    ("index", ["data.storage.endpoint=here", "data.shards=nothing_here_*.tar"], 1, "nothing_here_*.tar"),
    ("autoencoder", ["autoencoder=vq_f4"], 1, "give loss=vq"),
    ("autoencoder", ["autoencoder.attention_levels=[7]"], 1, "levels are 0 to 3"),
    ("latents", ["data.crop=random"], 1, "give data.crop=center"),
    ("index", ["data.shards=nothing_here_*.tar"], 1, "nothing_here_*.tar"),
    ("index", ["data.shards='pipe:cat x.tar'"], 1, "allow_pipe"),
    ("sample", [], 1, "is not a run folder"),
    ("quickstart", ["data.root=/nowhere/at/all"], 1, "there is nothing there"),
]  # fmt: skip


@pytest.mark.parametrize(("job", "overrides", "ranks", "remedy"), FAULTS, ids=lambda value: str(value)[:60])
def test_a_mixture_that_cannot_work_names_its_remedy(job, overrides, ranks, remedy):
    faults = check(composed(job, *overrides), ranks)
    assert any(remedy in fault for fault in faults), faults


def test_a_mixture_that_can_work_has_no_fault():
    config = read(JOBS["diffusion"], compose_job("diffusion", ["experiment=smoke"]))
    assert check(config, 2) == []


def test_a_setting_that_took_null_only_may_still_be_named():
    assert composed("diffusion", "unet.num_classes=null") == composed("diffusion")
    with pytest.raises(ConfigError, match=r"^unet.num_classes is unknown: .* give class_embedder="):
        composed("diffusion", "unet.num_classes=10")


def test_missing_unknown_and_ill_typed_values_are_told_together():
    values = compose_job("diffusion", ["train.max_steps=many", "+optim.momentum=0.9", "unet.dropout=0.1"])
    with pytest.raises(ConfigError) as error:
        read(JOBS["diffusion"], values)
    said = "\n".join(error.value.faults)
    assert "train.max_steps='many'" in said
    assert "optim.momentum is unknown" in said
    assert "data.shards is not set" in said and "train.global_batch is not set" in said
