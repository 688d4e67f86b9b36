"""What `ldmscale sample` refuses before it loads anything, for a model whose configuration is known."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ldmscale.config import JOBS
from ldmscale.config.checks import check
from ldmscale.config.checks.sampling import check_sample
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import plain, read
from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.diffusion.timesteps import SAMPLERS, SPACINGS, path_of


@pytest.fixture
def run(tmp_path):
    """Makes the folder of a run that looks finished."""

    def make(job: str, *overrides: str) -> Path:
        config = read(JOBS[job], compose_job(job, ["experiment=smoke", *overrides]))
        (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
        (tmp_path / "checkpoints" / "step_00000001" / "COMPLETE").touch()
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(config)))
        return tmp_path

    make.folder = tmp_path
    return make


def faults(model: Path, *overrides: str) -> list[str]:
    values = compose_job("sample", [f"sample.model={model}", "sample.prompts=[a,b]", *overrides])
    return check(read(JOBS["sample"], values), 1)


def test_what_fits_has_no_fault(run):
    model = run("diffusion")
    assert faults(model) == []
    assert (
        faults(model, "sample.sampler=ddpm", "sample.steps=1000", "sample.height=48", "sample.width=8") == []
    )
    assert faults(model, "sample.negative_prompts=[x,y]", "sample.eta=1.0") == []


def test_a_checkpoint_and_a_model_of_another_format_will_do(run, tmp_path_factory):
    assert faults(run("diffusion") / "checkpoints" / "step_00000001") == []
    assert "give 1 to 999" in faults(run.folder / "checkpoints" / "step_00000001", "sample.steps=1000")[0]
    foreign = tmp_path_factory.mktemp("foreign")
    (foreign / "model_index.json").touch()
    assert faults(foreign) == []
    assert "give sample.out=FOLDER" in faults(foreign / "model_index.json")[0]
    assert faults(foreign / "model_index.json", "sample.out=drawn") == []
    both = faults(foreign / "model_index.json", "sample.sampler=plms", "sample.eta=0.5")
    assert len(both) == 2 and "sample.out is not set" in both[0] and "sample.eta=0.5" in both[1]


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["sample.steps=1000"], "give 1 to 999"),
        (["sample.steps=1001", "sample.sampler=ddpm"], "give 1 to 1000"),
        (["sample.height=33"], "give a multiple, sample.height=32"),
        (["sample.eta=0.5", "sample.sampler=plms"], "give sample.eta=0"),
        (["sample.negative_prompts=x", "sample.guidance=1.0"], "or no negative prompts"),
        (["sample.negative_prompts=[x,y,z]"], "or one text for all"),
        (["sample.image=nowhere.png"], "give the path of a picture"),
        (["sample.mask=nowhere.png"], "give the picture that is redrawn"),
        (["sample.strength=0.5"], "give the picture that it changes"),
        (["sample.image=x", "sample.strength=0.01"], "give sample.strength=0.02 or more"),
        (["sample.image=x", "sample.strength=1.5"], "expected more than 0 and at most 1"),
        (["sample.out=s3://bucket/drawn"], "give a path without ://"),
    ],
    ids=str,
)
def test_what_does_not_fit_names_its_remedy(run, overrides, remedy):
    told = faults(run("diffusion"), *overrides)
    assert any(remedy in fault for fault in told), told


def test_pictures_that_cannot_be_used_are_told_before_anything_is_loaded(run, tmp_path_factory):
    model, folder = run("diffusion"), tmp_path_factory.mktemp("pictures")
    for name, size in (("photo", (70, 40)), ("half", (34, 20)), ("square", (40, 40)), ("tall", (30, 40))):
        Image.new("L", size).save(folder / f"{name}.png")
    (folder / "text.png").write_text("no picture")
    image = f"sample.image={folder}/photo.png"
    assert faults(model, image, f"sample.mask={folder}/half.png") == []
    drawn = ["sample.height=64", "sample.width=48"]  # without them a square
    assert faults(model, image, f"sample.mask={folder}/square.png") == []
    assert faults(model, image, f"sample.mask={folder}/tall.png", *drawn) == []
    for others in ([f"sample.mask={folder}/tall.png"], [f"sample.mask={folder}/square.png", *drawn]):
        assert any("give a mask of the shape" in fault for fault in faults(model, image, *others))
    assert any(
        "cannot be read as an image" in fault for fault in faults(model, f"sample.image={folder}/text.png")
    )


def test_negative_prompts_are_refused_by_models_that_read_no_captions(run):
    model = run("diffusion", "text_encoder=null", "unet.context_dim=null")
    assert any("reads no captions" in fault for fault in faults(model, "sample.negative_prompts=x"))


def test_prompts_may_be_numbers_for_classes_are(run):
    values = compose_job("sample", [f"sample.model={run('diffusion')}", "sample.prompts=[207,tank]"])
    assert read(JOBS["sample"], values).sample.prompts == ("207", "tank")


def test_a_run_of_another_job_is_refused(run):
    assert any("give the folder of a diffusion run" in fault for fault in faults(run("autoencoder")))


@pytest.mark.parametrize("zero", [False, True])
def test_the_check_and_the_sampler_refuse_the_same_paths(run, zero):
    model = run("diffusion", "diffusion=v", f"diffusion.zero_terminal_snr={str(zero).lower()}")
    schedule = NoiseSchedule.make("scaled_linear", 1000, 0.00085, 0.012, zero)
    given = read(JOBS["sample"], compose_job("sample", [f"sample.model={model}", "sample.prompts=a"])).sample
    for sampler in SAMPLERS:
        for spacing in (*SPACINGS, None):
            for steps in (1, 999, 1000, 1001):
                told = check_sample(replace(given, sampler=sampler, spacing=spacing, steps=steps))
                try:
                    path_of(sampler, schedule, steps, spacing)
                    refused = False
                except ValueError:
                    refused = True
                assert bool(told) == refused, (sampler, spacing, steps, told)
