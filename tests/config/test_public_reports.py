"""Reports of other projects on words of a command line: each situation, and what is right in it."""

import pytest

from ldmscale.cli import main
from ldmscale.config import JOBS
from ldmscale.config.compose import compose_job
from ldmscale.config.flags import parse
from ldmscale.config.load import resolved


@pytest.mark.parametrize(
    "text", ["1_1_1", "+/path/to/pattern_%r.bin", "example@example.com", "#", "3e563", "baz=qux"]
)
def test_good_text_is_taken(text):
    """hydra#1163 (1_1_1 became 111), hydra#962 and hydra#1074 (% and @), hydra#2705 (#), guildai#50 (3e563), hydra#938 (=)."""
    assert compose_job("evaluate", [f"evaluate.model={text}"])["evaluate"]["model"] == text


def test_a_text_of_a_file_that_yaml_reads_as_a_number_is_answered_with_quotes(tmp_path, capsys):
    """hydra#2599: `password: 1E234` of a file arrived as another text, without a word."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "site.yaml").write_text("nodes: 1\ntasks_per_node: 1\naccount: 1E5\n")
    line = [
        "submit",
        "autoencoder",
        "experiment=smoke",
        "--config-dir",
        str(tmp_path),
        "cluster=site",
        "--dry-run",
    ]
    assert main(line) == 2
    assert (
        "cluster.account=100000.0" in (said := capsys.readouterr().err)
        and "needs quotes (account: '...')" in said
    )


def test_a_choice_with_a_comma_is_an_error_that_names_the_sweep(capsys):
    """hydra#712: db=mysql,a in a plain run was accepted, and nothing was chosen."""
    assert main(["diffusion", "unet=text2img_1p45b,tiny"]) == 2
    assert "add --multirun, or choose one" in capsys.readouterr().err


def test_an_unknown_word_is_one_line_without_a_traceback(capsys):
    """hydra#349: foo=bar was answered with the whole traceback of the program."""
    assert main(["sample", "sample.model=x", "foo=bar"]) == 2
    said = capsys.readouterr().err
    assert "foo is unknown" in said and "Traceback" not in said


def test_a_group_is_chosen_by_number(tmp_path):
    """CausalTransformer#3: "Config group override must be a string or a list. Got int" for a file named 0.yaml."""
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "7.yaml").write_text("stage: 2\n")
    words = parse("autoencoder", ["experiment=smoke", "--config-dir", str(tmp_path), "zero=7"]).overrides
    assert resolved(JOBS["autoencoder"], words, 1).zero.stage == 2
