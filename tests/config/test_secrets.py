"""Hydra keeps the command line of a sweep in multirun.yaml: secrets in plain are refused before it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldmscale.cli import main
from ldmscale.config.secrets import sweep_faults

SHARDS = "data.shards=s3://bucket/a.tar"


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["data.storage.options={key: KEYMARKER, secret: OPTMARKER}"], ["options.key", "options.secret"]),
        (["++data.storage.options={key: '${oc.env:KEY}', secret: OPTMARKER}"], ["options.secret"]),
        (["data.storage.options={secret: OPTMARKER},{secret: KEYMARKER}"], ["options.secret"]),
        (["data.storage.options=choice({secret: OPTMARKER}, {anon: true})"], ["options.secret"]),
        (["data.storage.options={client_kwargs: {anything: OPTMARKER}}"], ["client_kwargs.anything"]),
        (["+data.storage.options.client_kwargs.anything=OPTMARKER"], ["client_kwargs.anything"]),
        (["data.shards=http://user:OPTMARKER@host/a.tar,s3://bucket/b.tar"], ["data.shards"]),
        (["data.shards='https://host/a.tar?X-Amz-Signature=OPTMARKER'"], ["data.shards"]),
        (["hydra.output_subdir=.hydra", "data.storage.options={secret: OPTMARKER}"], ["options.secret"]),
        (["--config-dir", "more", "data.storage.options={secret: OPTMARKER}"], ["options.secret"]),
        (["data.storage.options={key: '${oc.env:KEY}', secret: \"${oc.env:SECRET}\"}"], []),
        (["data.check=headers,decode", "data.min_image_side=range(1, 4)"], []),
    ],
)  # fmt: skip
def test_each_secret_in_plain_is_named_and_not_shown(words: list[str], keys: list[str]) -> None:
    faults = sweep_faults("index", ["--multirun", *words])
    found = [fault.split(" holds a secret, and multirun.yaml keeps none")[0] for fault in faults]
    assert len(found) == len(keys) and all(map(str.endswith, sorted(found), sorted(keys)))
    assert "MARKER" not in "".join(faults)


def test_a_sweep_with_a_secret_writes_nothing_and_one_with_a_variable_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINE", "OPTMARKER")
    sweep = [
        "index",
        "--multirun",
        "data.shards=absent.tar",
        "data.check=headers,spans",
        "hydra.output_subdir=.hydra",
    ]
    assert main([*sweep, "data.storage.options={secret: OPTMARKER}"]) == 2
    told = capfd.readouterr()
    assert (
        "data.storage.options.secret='${oc.env:NAME}'" in told.err and "OPTMARKER" not in told.out + told.err
    )
    assert not list(tmp_path.iterdir())

    main([*sweep, "data.storage.options={secret: '${oc.env:MINE}'}"])
    told = capfd.readouterr()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"multirun.yaml", "overrides.yaml"} <= {path.name for path in written}
    for path in written:
        assert "OPTMARKER" not in path.read_text(), path
    assert "OPTMARKER" not in told.out + told.err


def test_what_only_shows_the_configuration_is_not_refused() -> None:
    assert sweep_faults("index", ["--cfg", "job", "data.storage.options={secret: OPTMARKER}"]) == []
