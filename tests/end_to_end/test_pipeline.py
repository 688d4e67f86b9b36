"""The three stages on a few images by the real commands on two gloo ranks under ZeRO-3: they agree with themselves.

One autoencoder and one set of latents serve all tests of this file, since each launch of ranks takes seconds.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import running

import ldmscale as library
from ldmscale.builders.feature_networks import open_features
from ldmscale.data.latents.format import LatentManifest
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.transforms import LatentItem
from ldmscale.data.shards.mixture import Mixture, WeightedShards
from ldmscale.evaluation.metrics import FeatureSums, frechet_distance
from ldmscale.models.first_stage import digest
from ldmscale.stages.first_stage import FirstStage
from ldmscale.stages.validation import SEED

pytestmark = pytest.mark.distributed

AUTOENCODER = [
    "autoencoder", "experiment=smoke", "run.dir=ae", "train.max_steps=4", "loss.gan_start_step=2", "train.rank_micro_batch=2",
    "preview.every_steps=4", "preview.images=4",
]  # fmt: skip
DIFFUSION = [
    "diffusion", "experiment=smoke", "data=latents", "data.workers=0", "data.shards='latents/*.tar'", "first_stage.path=ae",
    "preview.sampler_steps=2", "preview.images=3", "checkpoint.save_every_steps=3", "train.max_steps=6",
    # Everything that the objective may draw besides noise and timestep, so that ranks and resumes must agree on it.
    "diffusion=v", "diffusion.weighting=min_snr", "diffusion.offset_noise=0.1", "diffusion.input_perturbation=0.1",
    # On two ranks four micro-batches a step, each computed twice; the run on one rank has one, and keeps its activations.
    "train.rank_micro_batch=1", "unet.checkpointing=full", "text_encoder.checkpointing=full",
]  # fmt: skip
WHOLE = ["zero=0", "train.rank_micro_batch=8", "unet.checkpointing=off", "text_encoder.checkpointing=off"]


# 10 of its 24 samples: neither a multiple of the ranks' batches on two ranks nor on one
VALIDATED = ["data.heldout_shards='latents/00001.tar'", "validation.every_steps=3", "validation.samples=10",
             "validation.timestep_bins=3"]  # fmt: skip
GENERATED = [
    "generation.every_steps=6",
    "generation.samples=7",
    "generation.rank_batch=2",
    "generation.sampler_steps=2",
]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss/total"] for line in lines if "loss/total" in line]


def finished(done, status: int = 0):
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory, ldmscale) -> Path:
    """A folder with an autoencoder, its latents, and one straight diffusion run of six steps on two ranks."""
    folder = tmp_path_factory.mktemp("pipeline")
    finished(ldmscale(*AUTOENCODER, cwd=folder, ranks=2))
    latents = [
        "latents",
        "data=shards",
        "data.shards='ae/data/*.tar'",
        "data.image_size=32",
        "first_stage.path=ae",
    ]
    finished(ldmscale(*latents, "latents.path=latents", "latents.dtype=fp32", cwd=folder, ranks=2))
    finished(
        ldmscale(
            *DIFFUSION,
            "run.dir=straight",
            *VALIDATED,
            *GENERATED,
            "preview.every_steps=6",
            cwd=folder,
            ranks=2,
        )
    )
    return folder


def test_the_run_folder_has_what_scripts_rely_on(place):
    run = place / "straight"
    for name in ("config.yaml", "metrics.jsonl", "run.json", "data_ledger.jsonl", "checkpoints/latest",
                 "logs/rank_00000.log", "logs/rank_00001.log", "samples/step_00000006.png",
                 "tokenizer/tokenizer.json"):  # fmt: skip
        assert (run / name).exists(), name
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000006"
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*/COMPLETE"))
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    for key in ("step", "images_seen", "loss/total", "lr", "gradient_norm", "throughput/images_per_second",
                "time/data_wait_share", "memory/peak_gib"):  # fmt: skip
        assert key in first
    assert first["images_seen"] == 8
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {f"loss/bin_{k}" for k in range(1, 5)} <= {key for line in lines for key in line}
    assert all(0 < line["loss/total"] < line["loss/unweighted"] for line in lines if "loss/total" in line)


def test_every_term_of_the_autoencoders_loss_is_measured(place):
    lines = [json.loads(line) for line in (place / "ae" / "metrics.jsonl").read_text().splitlines()]
    assert "gan/adaptive_weight" not in lines[1] and lines[3]["gan/adaptive_weight"] > 0
    for key in ("loss/pixel", "loss/kl", "gan/discriminator", "gan/logit_real", "gan/logit_fake"):
        assert np.isfinite(lines[3][key])
    assert lines[4]["latent/factor"] > 0  # measured at the end
    assert (place / "ae" / "samples" / "reconstruction_step_00000004.png").exists()


def test_a_finished_run_says_so_and_does_not_train_again(place, ldmscale):
    before = (place / "straight" / "metrics.jsonl").read_text()
    done = finished(ldmscale(*DIFFUSION, "run.dir=straight", "preview.every_steps=6", cwd=place))
    assert "has finished" in done.stderr
    assert (place / "straight" / "metrics.jsonl").read_text() == before


def test_interrupted_and_resumed_equals_straight(place, ldmscale):
    """The straight run began with a dry run, the resumed one does without: it leaves nothing behind."""
    first = ["run.dir=resumed", "train.max_steps=3", "preview.every_steps=0", "safety.dry_run=false"]
    finished(ldmscale(*DIFFUSION, *first, cwd=place, ranks=2))
    on_images = ["data.heldout_shards='ae/data/00001.tar'", *VALIDATED[1:]]
    second = ["run.dir=resumed", "preview.every_steps=0", *on_images]
    done = finished(ldmscale(*DIFFUSION, *second, cwd=place, ranks=2))
    assert "resumed from" in done.stderr
    # Held-out images that are encoded give what the latents made of them gave.
    assert validations(place / "resumed")[-1] == pytest.approx(validations(place / "straight")[-1], rel=2e-5)
    assert losses(place / "resumed") == losses(place / "straight")
    ours, theirs = (library.load(place / name).denoiser.state_dict() for name in ("resumed", "straight"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture(scope="module")
def one(place, ldmscale) -> Path:
    """The straight run once more, by one rank without ZeRO, accumulation and checkpointing."""
    alone = ["run.dir=one", *WHOLE, "preview.every_steps=0"]
    finished(ldmscale(*DIFFUSION, *VALIDATED, *GENERATED, *alone, cwd=place, ranks=1))
    return place / "one"


def test_one_rank_without_zero_accumulation_and_checkpointing_follows_two_ranks_with_all_three(place, one):
    assert losses(one) == pytest.approx(losses(place / "straight"), rel=2e-6)
    # The losses by ranges of the timesteps, too: samples weigh alike, however they were shared out.
    alone, two = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, place / "straight")
    )
    bins = [{key: line[key] for key in line if key.startswith("loss/bin_")} for line in alone]
    assert len({len(found) for found in bins}) > 1  # some step has a range without samples
    for found, line in zip(bins, two, strict=True):
        assert found == pytest.approx(
            {key: line[key] for key in line if key.startswith("loss/bin_")}, rel=2e-5
        )


def validations(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [{k: v for k, v in line.items() if k.startswith("validation/")} for line in lines]
    return [line for line in found if line]


def test_the_validation_loss_is_the_same_on_any_number_of_ranks_and_told_by_weights_and_timesteps(place, one):
    alone, two = validations(one), validations(place / "straight")
    assert len(two) == 2 and two[0] != two[1]
    assert [line.keys() for line in alone] == [line.keys() for line in two]
    for first, other in zip(alone, two, strict=True):
        assert first == pytest.approx(other, rel=2e-6)
    last = two[-1]
    assert last["validation/raw/loss"] != last["validation/ema/loss"]
    bins = [last[f"validation/raw/bin_{k}"] for k in (1, 2, 3)]
    assert min(bins) < last["validation/raw/loss"] < max(bins)


def generated(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (found,) = ({k: v for k, v in line.items() if k.startswith("generation/")} for line in lines if any(
        key.startswith("generation/") for key in line))  # fmt: skip
    return found


def test_figures_of_drawn_images_are_the_same_on_any_number_of_ranks_and_those_of_the_finished_model(
    place, one
):
    """Drawn once more by the loaded model, image by image, and measured by the covariances themselves."""
    two = generated(place / "straight")
    assert generated(one) == pytest.approx(two, rel=1e-4)
    parts = library.load(place / "straight")
    manifest = LatentManifest.load(place / "latents")
    reader = LatentItem(manifest.format, tokenizer=parts.tokenizer)
    index = Mixture.open([WeightedShards(str(place / "latents" / "00001.tar"))], build_missing=True)
    batch = next(Loader(index, reader, seed=0, rank=0, world=1, global_batch=7, rank_micro_batch=7))
    features = open_features("efficientnet_lite0", None, None, torch.device("cpu"), key="")
    first_stage = FirstStage(parts.autoencoder, parts.scale, torch.device("cpu"))
    real = features(first_stage.images(first_stage.batch_latents(batch, SEED)).clamp(-1, 1))
    images = [library.sample(parts, [c], steps=2, seeds=[n]) for n, c in enumerate(batch["caption"])]
    drawn = features(torch.cat(images).clamp(-1, 1))
    gaussians = []
    for rows in (real.double(), drawn.double()):
        sums = FeatureSums(rows.shape[1], torch.device("cpu"))
        sums.add(rows)
        gaussians.append(sums.gaussian())
    distance = two["generation/frechet_distance_efficientnet_lite0"]
    assert distance == pytest.approx(frechet_distance(*gaussians), rel=1e-4) and distance > 1
    nearest = [int((real - row).norm(dim=1).argmin()) for row in drawn]
    assert two["generation/own_nearest_share"] == pytest.approx(
        sum(a == b for a, b in enumerate(nearest)) / 7
    )


def test_precomputed_latents_give_the_losses_of_online_encoding(place, ldmscale):
    online = [o for o in DIFFUSION if not o.startswith("data")]
    finished(
        ldmscale(
            *online,
            "data=shards",
            "data.shards='ae/data/*.tar'",
            "data.image_size=32",
            "data.workers=0",
            "run.dir=online",
            "preview.every_steps=0",
            cwd=place,
            ranks=1,
        )
    )
    assert losses(place / "online") == pytest.approx(losses(place / "straight"), rel=2e-5)


def test_latents_of_another_autoencoder_are_refused(place, ldmscale):
    other = [o.replace("run.dir=ae", "run.dir=other") for o in AUTOENCODER]
    finished(ldmscale(*other, "seed=5", "train.max_steps=1", "preview.every_steps=0", cwd=place))
    changed = [o.replace("first_stage.path=ae", "first_stage.path=other") for o in DIFFUSION]
    done = finished(ldmscale(*changed, "run.dir=mixed", "preview.every_steps=0", cwd=place), status=2)
    assert "were made by autoencoder" in done.stderr


def test_a_changed_seed_is_refused_in_an_old_run(place, ldmscale):
    done = finished(
        ldmscale(*DIFFUSION, "run.dir=straight", "preview.every_steps=6", "seed=1", cwd=place), status=2
    )
    assert "seed=1" in done.stderr and "was started with 0" in done.stderr


def test_averaged_weights_are_what_load_gives_and_differ_from_raw_ones(place):
    averaged, raw = library.load(place / "straight", ema=True), library.load(place / "straight", ema=False)
    a, b = averaged.denoiser.state_dict(), raw.denoiser.state_dict()
    assert any(not torch.equal(a[key], b[key]) for key in a)
    assert (
        digest(averaged.autoencoder)
        == json.loads((place / "latents" / "manifest.json").read_text())["format"]["autoencoder"]
    )


@pytest.fixture(scope="module")
def sets(place, ldmscale) -> Path:
    """Four prompts drawn twice: into "a" by one rank in one batch, into "b" by two ranks one by one."""
    prompts = "sample.prompts=[red circle,blue square,green triangle,orange circle]"
    common = ["sample", "sample.model=straight", prompts, "sample.steps=3"]
    finished(ldmscale(*common, "sample.out=a", "sample.rank_batch=4", cwd=place))
    finished(ldmscale(*common, "sample.out=b", "sample.rank_batch=1", cwd=place, ranks=2))
    return place


def test_a_prompt_gives_one_image_whatever_batch_and_ranks(sets):
    place = sets
    names = sorted(p.name for p in (place / "a").glob("0*.png"))
    assert len(names) == 4 and (place / "b" / "grid.png").exists()
    for name in names:
        one, other = (np.asarray(Image.open(place / x / name)).astype(int) for x in "ab")
        assert abs(one - other).max() <= 1
    assert Image.open(place / "a" / names[0]).text["prompt"] == "red circle"
    drawn = library.sample(library.load(place / "straight"), ["red circle"], steps=3, seeds=[0])
    pixels = ((drawn[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy().astype(int)
    assert abs(pixels - np.asarray(Image.open(place / "a" / names[0])).astype(int)).max() <= 1


def test_a_half_done_set_goes_on_as_it_was_begun(sets, ldmscale):
    """One picture is lost, one is torn; the set grows, and is then asked for otherwise."""
    place = sets
    names = sorted(p.name for p in (place / "a").glob("0*.png"))
    (place / "a" / names[1]).unlink()
    (place / "a" / names[2]).write_bytes((place / "b" / names[2]).read_bytes()[:-9])
    kept = {name: (place / "a" / name).stat().st_mtime_ns for name in (names[0], names[3])}
    prompts = "sample.prompts=[red circle,blue square,green triangle,orange circle,red square]"
    common = ["sample", "sample.model=straight", prompts, "sample.out=a"]
    done = finished(ldmscale(*common, "sample.steps=3", cwd=place, ranks=2))
    assert "5 images for 5 prompts, 3 of them to be drawn" in done.stderr
    assert "images 3/3" in done.stderr and "images/s" in done.stderr  # plain lines, for there is no terminal
    for name in names:
        one, other = (np.asarray(Image.open(place / x / name)).astype(int) for x in "ab")
        assert abs(one - other).max() <= 1
    assert all((place / "a" / name).stat().st_mtime_ns == before for name, before in kept.items())
    done = finished(ldmscale(*common, "sample.steps=4", "sample.sampler=plms", cwd=place), status=2)
    assert "give sample.steps=3" in done.stderr and "give sample.sampler=ddim" in done.stderr
    assert len(list((place / "a").glob("0*.png"))) == 5


def test_the_command_draws_over_pictures_in_other_sizes_from_standard_input(place, ldmscale):
    Image.new("RGB", (300, 200), "blue").save(place / "blue.jpg")
    Image.fromarray(np.tile(np.uint8([0] * 16 + [255] * 48), (48, 1))).save(place / "right.png")
    how = ["sample.image=blue.jpg", "sample.mask=right.png", "sample.height=48", "sample.width=64", "sample.steps=2",
           "sample.sampler=dpmpp_2m", "sample.negative_prompts=green", "sample.images_per_prompt=2",
           "sample.distinct_seeds=true"]  # fmt: skip
    finished(
        ldmscale("sample", "sample.model=straight", "sample.prompts=-", *how, cwd=place, given="red\n\nred\n")
    )
    drawn = [Image.open(p) for p in sorted((place / "straight" / "samples" / "drawn").glob("0*.png"))]
    assert [image.text["seed"] for image in drawn] == ["0", "1", "2", "3"]
    assert len({image.tobytes() for image in drawn}) == 4
    for image in drawn:
        assert image.size == (64, 48) and image.text["negative_prompt"] == "green"
        assert image.text["sampler"] == "dpmpp_2m" and image.text["mask"].startswith("right.png (")
        pixels = np.asarray(image)
        assert (abs(pixels[:, :16].astype(int) - [0, 0, 254]) <= 1).all() and pixels[:, 16:].std() > 1


def test_a_signal_ends_with_75_after_a_save_and_the_same_command_goes_on(place, ldmscale):
    checkout = Path(__file__).resolve().parents[2]
    command = [str(checkout / "launch" / "local.sh"), "-n", "2", "--cpu", *DIFFUSION, "run.dir=signalled"]
    command += ["train.max_steps=100000", "checkpoint.save_every_steps=0", "preview.every_steps=0"]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    run, began = place / "signalled", time.monotonic()
    with (
        open(place / "signalled.log", "w") as log,
        running(command, cwd=place, env=environment, stdout=log, stderr=log) as job,
    ):
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < 2:
            assert job.poll() is None and time.monotonic() - began < 180, (
                place / "signalled.log"
            ).read_text()
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=120) == 75, (place / "signalled.log").read_text()[-4000:]
    done = len(losses(run))
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{done:08d}"
    again = [o for o in command[4:] if not o.startswith("train.max_steps")]
    finished(ldmscale(*again, f"train.max_steps={done + 2}", cwd=place, ranks=2))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, done + 3))  # neither gap nor double


def test_a_run_that_stopped_at_its_last_step_still_measures_the_latent_scale(place, ldmscale):
    common = [o.replace("run.dir=ae", "run.dir=longer") for o in AUTOENCODER]
    common += ["preview.every_steps=0", "checkpoint.save_every_steps=1"]
    finished(ldmscale(*common, "train.max_steps=3", cwd=place))
    identity = place / "longer" / "run.json"
    # As if the run had been asked for more and was stopped at the save of step 2.
    shutil.rmtree(place / "longer" / "checkpoints" / "step_00000003")
    identity.write_text(json.dumps(json.loads(identity.read_text()) | {"finished_step": None}))
    finished(ldmscale(*common, "train.max_steps=2", cwd=place))
    assert library.load(place / "longer").latent_statistics["factor"] > 0


def test_shards_that_changed_are_refused_by_all_ranks_with_one_message(place, ldmscale):
    shutil.copytree(place / "ae" / "data", place / "kept", copy_function=shutil.copy2)
    for tar in (place / "kept").glob("*.tar"):
        os.utime(tar)
    data = ["data=shards", "data.shards='kept/*.tar'", "data.image_size=32", "data.workers=0"]
    done = ldmscale(*AUTOENCODER, *data, "run.dir=stale", cwd=place, ranks=2)
    finished(done, status=2)
    assert done.stderr.count("changed since it was indexed") == 2  # two shards, told by rank 0 alone


def test_latents_pass_over_what_cannot_be_used_and_write_it_down(place, ldmscale):
    import io

    import webdataset

    (place / "dirty").mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(picture, "PNG")
    with webdataset.TarWriter(str(place / "dirty" / "0.tar")) as tar:
        for key in range(6):
            png, text = picture.getvalue(), b"{}"
            if key == 1:
                png = png[:60]
            if key == 3:
                text = b"{not json"
            tar.write({"__key__": f"{key}", "png": png, "txt": "red", "json": text})
    command = [
        "latents",
        "data=shards",
        "data.shards=dirty/0.tar",
        "data.image_size=32",
        "first_stage.path=ae",
    ]
    finished(ldmscale(*command, "latents.path=clean", cwd=place))
    manifest = json.loads((place / "clean" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["skipped"]) == (4, 2)
    assert len((place / "clean" / "data_ledger.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("form", ["diffusers", "compvis"])
def test_a_run_is_exported_and_draws_the_same_images(form, place, ldmscale):
    out, source = f"exported_{form}", "straight"
    if form == "compvis":
        # Which knows no v-prediction, and says so.
        refused = ldmscale("export", "src=straight", "dst=refused", "format=compvis", cwd=place)
        assert "diffusion.prediction=v" in finished(refused, 2).stderr and not (place / "refused").exists()
        source = "eps"
        finished(
            ldmscale(*DIFFUSION, "diffusion=eps", "run.dir=eps", "train.max_steps=2", "zero=0", cwd=place)
        )
    for ema in ("true", "false"):
        folder = f"{out}_{ema}"
        finished(
            ldmscale("export", f"src={source}", f"dst={folder}", f"format={form}", f"ema={ema}", cwd=place)
        )
        run = library.load(place / source, ema=ema == "true")
        if form == "compvis":
            # Heads, schedule, scale and size of latents come from the yaml that was written beside the checkpoint.
            tokens = [f"tokenizer={source}/tokenizer", f"dst={folder}_in", f"src={folder}/model.ckpt"]
            finished(ldmscale("import", *tokens, cwd=place))
            folder += "_in"
        parts = library.load(place / folder)
        for mine, there in zip(run.denoiser.parameters(), parts.denoiser.parameters(), strict=True):
            assert torch.equal(mine, there)
        noise = torch.randn(2, *run.latent_shape, generator=torch.Generator().manual_seed(1))
        drawn = [library.sample(p, ["a red dragon", "two"], steps=3, noise=noise) for p in (run, parts)]
        assert torch.equal(*drawn)


def test_an_autoencoder_run_is_exported(place, ldmscale):
    from diffusers import AutoencoderKL

    finished(ldmscale("export", "src=ae", "dst=ae_there", "format=diffusers", cwd=place))
    finished(ldmscale("export", "src=ae", "dst=ae.safetensors", "format=compvis", cwd=place))
    run = library.load(place / "ae")
    there = AutoencoderKL.from_pretrained(place / "ae_there")
    assert there.config.scaling_factor == pytest.approx(run.latent_statistics["factor"], rel=1e-6)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = there.encode(images).latent_dist.mean
        for parts in (run, library.load(place / "ae_there"), library.load(place / "ae.safetensors")):
            found = parts.autoencoder.encode(images).mean
            assert float((found - expected).abs().max() / expected.abs().max()) < 5e-6
