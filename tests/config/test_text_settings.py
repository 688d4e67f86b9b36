"""Every setting whose type is text takes the text that a shell delivers."""

import os

import pytest
from omegaconf import OmegaConf

from ldmscale.config import JOBS, AutoencoderJob
from ldmscale.config.compose import compose_job, compose_valid
from ldmscale.config.load import resolved as resolved_job
from ldmscale.config.overrides import setting, settle_overrides, text_settings, typed_settings
from ldmscale.errors import ConfigError

TEXTS = [
    "süß", "猫", "데이터", "/data/café/*.tar", "näive façade", "e\u0301", "🐈",
    "20240102", "1_000", "1e3", "0x10", "007", "-1", "3.50", "1:30:00", "nan", "inf", "true", "No", "None", "~",
    "a,b", "a, b", ",", "a,", "[1]/x", "/data/x[1]/a.tar", "a(1)", "choice(a,b)", "glob(*)", "str(3)", "{a", "{0..9}.tar",
    "/data/{00000..00009}.tar", ":)", "a: b", "a=b", "=", "https://host/a.tar?key=1&more=%20", "#1", "50%", "a@b", "!",
    "$HOME", "$5", "a$", "${", "a ${ b", "it's", "'", '"', "'a' and 'b'", 'say "a"', "back\\slash", "\\", "a\\'b", "a\\,b",
    " a ", "a  b", "--flag", "a\tb", "s3://bucket/{000..099}.tar", "x >= 0.5 and y in [1, 2]", "*", "a|b; c",
]  # fmt: skip
KEYS = [(job, key) for job in JOBS for key in text_settings(job)]


def value_at(values: dict, key: str) -> object:
    for part in key.split("."):
        values = values[part]
    return values


def resolved(words: list[str]) -> dict:
    """What Hydra and OmegaConf make of settled words, without the files of conf/."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    config = OmegaConf.create({})
    for override in OverridesParser.create().parse_overrides(words):
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
    return OmegaConf.to_container(config, resolve=True)


def test_the_settings_with_text_are_found():
    assert len(KEYS) > 100
    assert {"run.name", "run.dir", "data.shards", "tracking.tags", "data.filter"} <= set(
        text_settings("diffusion")
    )
    assert {"sample.prompts", "sample.ema"} <= set(text_settings("sample"))
    assert "cluster.environment" in text_settings("submit")
    assert not {"optim.lr", "data.kind", "optim.betas"} & set(text_settings("diffusion"))
    # The keys of every member of a union count.
    assert {"text_encoder.tokenizer", "text_encoder.path"} <= set(typed_settings("diffusion"))


@pytest.mark.parametrize("job", JOBS)
def test_every_text_setting_takes_every_text_as_it_is_delivered(job):
    for key, kind in text_settings(job).items():
        if kind.one:
            texts = [text for text in TEXTS if not (kind.flag and text.lower() in ("true", "false"))]
            for text in texts:
                once = settle_overrides(job, [f"{key}={text}"])
                assert value_at(resolved(once), key) == text
                assert settle_overrides(job, once) == once  # read again by the job of a sweep
        if kind.several:
            plain = [text for text in TEXTS if "," not in text and text == text.strip()]
            for text in plain:
                assert value_at(resolved(settle_overrides(job, [f"{key}=[{text}]"])), key) == [text]
                both = settle_overrides(job, [f"{key}=[x y, {text},'a, b']"])
                assert value_at(resolved(both), key) == ["x y", text, "a, b"]
        if kind.several and not kind.one:  # a list of one needs no brackets
            assert value_at(resolved(settle_overrides(job, [f"{key}=süß"])), key) == ["süß"]
        if kind.mapping:
            for text in (
                text
                for text in TEXTS
                if text == text.strip() and "," not in text and "{a" not in text and "${" not in text
            ):
                assert value_at(resolved(settle_overrides(job, [f"{key}.NAME={text}"])), key) == {
                    "NAME": text
                }
                assert value_at(resolved(settle_overrides(job, [f"{key}={{A: {text}, B: 1}}"])), key) == {
                    "A": text,
                    "B": "1",
                }


@pytest.mark.parametrize("job", JOBS)
def test_texts_pass_through_the_composition_of_every_job(job):
    keys = [key for key, kind in text_settings(job).items() if kind.one and not kind.flag]
    keys = [key for key in keys if not key.startswith("text_encoder.")]
    given = {key: TEXTS[place % len(TEXTS)] for place, key in enumerate(keys)}
    values, faults = compose_valid(job, [f"{key}={text}" for key, text in given.items()])
    assert not faults
    assert {key: value_at(values, key) for key in given} == given


def test_what_is_an_expression_stays_one(monkeypatch):
    monkeypatch.setenv("SITE", "süd")
    run = compose_job("diffusion", ["run.name='a b'", "run.dir=/runs/${run.name}-${oc.env:SITE}"])["run"]
    assert run["name"] == "a b" and run["dir"] == "/runs/a b-süd"
    assert compose_job("diffusion", ["data.filter=null"])["data"]["filter"] is None
    assert compose_job("diffusion", ["data.shards=???"])["data"]["shards"] == "???"
    assert (
        compose_job("diffusion", ["run.name=sweep_${optim.lr}", "optim.lr=2e-4"])["run"]["name"]
        == "sweep_0.0002"
    )
    assert compose_job("diffusion", ["run.name=\\${USER}"])["run"]["name"] == "${USER}"
    assert compose_job("sample", ["sample.model=x", "sample.ema=false"])["sample"]["ema"] is False
    mixture = "data.shards=[{shards: /café/{0..3}.tar, weight: 3}, {shards: '1e3', weight: 1}]"
    assert compose_job("index", [mixture])["data"]["shards"] == [
        {"shards": "/café/{0..3}.tar", "weight": 3}, {"shards": "1e3", "weight": 1}]  # fmt: skip


def test_a_variable_of_the_shell_in_braces_is_refused_with_what_to_write():
    with pytest.raises(ConfigError) as error:
        compose_job("index", ["data.shards=/data/${USER}/x.tar"])
    assert "${oc.env:USER}" in str(error.value) and "single quotes" in str(error.value)
    os.environ.pop("USER_OF_NOBODY", None)
    with pytest.raises(ConfigError, match="USER_OF_NOBODY"):
        compose_job("index", ["data.shards=/data/${oc.env:USER_OF_NOBODY}/x.tar"])


def test_commas_are_a_sweep_with_multirun_only():
    def swept(word: str) -> str:
        return settle_overrides("diffusion", [word], sweep=True)[0]

    assert swept("run.name=a,süß") == "++run.name='a','süß'"
    assert swept("run.name=choice(a,süß)") == "++run.name=choice('a','süß')"
    assert swept("run.name='a,b'") == "++run.name='a,b'"
    assert swept("data.shards=[a,b],[c]") == "++data.shards=['a','b'],['c']"
    assert swept("optim.lr=1e-4,1e-3") == "++optim.lr=1e-4,1e-3"
    assert swept("zero=0,2") == "zero='0','2'"
    with pytest.raises(ConfigError, match="--multirun"):
        compose_job("diffusion", ["optim.lr=1e-4,1e-3"])
    with pytest.raises(ConfigError, match=r"tracking.tags=\[A,B\]"):
        compose_job("diffusion", ["tracking.tags=a,b"])


def test_a_setting_that_the_program_writes_is_read_back():
    for text in [*TEXTS, "a ${optim.lr} b", "\\${x}", "\\\\${optim.lr}"]:
        assert resolved(settle_overrides("diffusion", [setting("run.dir", text)]))["run"]["dir"] == text


@pytest.mark.parametrize("name", ["", "..", "../a", "a/./b", "a\x1b[1m", "x" * 300, "a\nb"])
def test_a_name_that_is_no_folder_of_its_own_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=r"run\.name="):
        resolved_job(AutoencoderJob, ["experiment=smoke", setting("run.name", name)], 1)


@pytest.mark.parametrize("name", ["süß", "20240102", "1e3", "group/süß", "a, b [c] $d"])
def test_any_other_name_is_a_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolved_job(AutoencoderJob, ["experiment=smoke", f"run.name={name}"], 1)
    assert config.run.name == name and config.run.dir == f"runs/{name}"
