"""`ldmscale evaluate` of a vq run: the figures of its own validation, on any number of ranks, with every choice told."""

import hashlib
import json

import pytest

from ldmscale import load
from ldmscale.data.sources.synthetic import synthetic_shards

pytestmark = pytest.mark.distributed


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluation_repeats_the_validation_and_does_not_depend_on_ranks(tmp_path, ldmscale):
    synthetic_shards(tmp_path / "d", "images", 32, 3, 4)
    train, heldout = tmp_path / "d" / "00000.tar", tmp_path / "d" / "00001.tar"
    done = ldmscale(
        "autoencoder", "experiment=smoke", "autoencoder=tiny_vq", "loss=vq", "run.dir=run", "zero=3", "ema.enabled=true",
        f"data.shards={train}", f"data.heldout_shards={heldout}", "train.max_steps=6", "loss.r1_weight=1",
        "codebook.start=kmeans", "codebook.revive_after_steps=2", "validation.every_steps=3", "validation.images=21",
        "validation.rank_batch=4", "preview.every_steps=6", "scale_samples=13", cwd=tmp_path, ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    logged = lines(tmp_path / "run" / "metrics.jsonl")
    measured = [line for line in logged if "validation/psnr_db" in line]
    assert [line["step"] for line in measured] == [3, 6]
    assert (tmp_path / "run" / "samples" / "step_00000006.png").is_file() or list(
        (tmp_path / "run" / "samples").iterdir()
    )
    steps = [line for line in logged if "loss/total" in line]
    for name in ("gan/adaptive_weight", "gan/logit_real", "gan/logit_fake", "gan/r1", "codebook/usage",
                 "codebook/perplexity", "loss_share/pixel", "loss_share/gan", "latent/std"):  # fmt: skip
        assert name in steps[-1], name
    shares = [value for name, value in steps[-1].items() if name.startswith("loss_share/")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)
    results = []
    for ranks in (1, 2):
        done = ldmscale(
            "evaluate", "evaluate.model=run", f"data.shards={heldout}", "evaluate.samples=21",
            "evaluate.rank_batch=4", "evaluate.perceptual=efficientnet_lite0", "evaluate.features=efficientnet_lite0",
            *(["data.image_size=32"] if ranks == 1 else []),  # else that of the run
            f"evaluate.out=out_{ranks}.json", cwd=tmp_path, ranks=ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        results.append(json.loads((tmp_path / f"out_{ranks}.json").read_text()))
    one, two = results
    assert one["protocol"] == two["protocol"] and (one["ranks"], two["ranks"]) == (1, 2)
    for name in ("psnr_db", "ssim", "frechet_distance_efficientnet_lite0"):
        assert one["metrics"][name] == pytest.approx(two["metrics"][name], rel=1e-5), name
    distances = [result["metrics"]["perceptual"]["distance"] for result in results]
    assert distances[0] == pytest.approx(distances[1], rel=1e-5)
    assert "fid" not in json.dumps(one).lower()
    for name in ("psnr_db", "ssim"):
        assert measured[-1][f"validation/{name}"] == pytest.approx(one["metrics"][name], rel=1e-4)
    protocol = one["protocol"]
    assert (protocol["images"], protocol["latent"], protocol["trained_on"]) == (21, "nearest codes", [])
    assert protocol["model"]["ema"] is True and protocol["model"]["average"] == "ema"
    assert load(tmp_path / "run", ema=False).autoencoder_average is None
    # torchmetrics#1652: a Frechet distance of one image is an error that says so, not one of the linear algebra.
    for features, images, status in (("efficientnet_lite0", 1, 2), ("none", 1, 0)):
        done = ldmscale(
            "evaluate", "evaluate.model=run", f"data.shards={heldout}", f"evaluate.samples={images}",
            f"evaluate.features={features}", "evaluate.out=one.json", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr[-3000:]
        assert (status == 0) or "needs two, for a covariance" in done.stderr
    # 13 images that neither ranks nor batches divide: the latents of 8 x 8 positions of just these.
    statistics = load(tmp_path / "run").latent_statistics
    assert statistics is not None and statistics["positions"] == 13 * 8 * 8
    names = [f"00001.tar/{key}" for key in keys(heldout, 21)]
    assert protocol["sample_names_sha256"] == hashlib.sha256("\n".join(names).encode()).hexdigest()


def keys(shard, count):
    import tarfile

    with tarfile.open(shard) as tar:
        found = [name.split(".")[0] for name in tar.getnames()]
    return list(dict.fromkeys(found))[:count]
