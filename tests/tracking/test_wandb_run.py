"""W&B without a network: real offline runs, read back from the files that they leave."""

import os
import pty
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldmscale.cli import main
from ldmscale.errors import ConfigError
from ldmscale.tracking.wandb_environment import choose_mode
from ldmscale.tracking.wandb_run import start_wandb

sys.path.insert(0, str(Path(__file__).parent))
from wandb_file import read_wandb_file


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    """No key and no settings of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def left_by(folder: Path):
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return read_wandb_file(path)


def test_an_offline_run_holds_what_was_logged_on_its_own_step_axis(tmp_path):
    run = start_wandb(
        tmp_path, "auto", run_id="abcd1234", name="trial", project="tests", tags=("a",), config={"seed": 3}
    )
    assert run is not None and run.mode == "offline"
    # steps as after a resume: W&B's own counter would refuse to go back
    for step in (1, 2, 3, 2, 3):
        run.log(step, {"loss/total": 1.0 / step, "images_seen": 8.0 * step})
    run.log_image(3, "samples", np.zeros((4, 6, 3), dtype=np.uint8), "a prompt")
    run.close("finished")

    left = left_by(tmp_path)
    losses = [(row["step"], row["loss/total"]) for row in left.history if "loss/total" in row]
    assert losses == [(1, 1.0), (2, 0.5), (3, 1 / 3), (2, 0.5), (3, 1 / 3)]
    assert (left.run_id, left.project, left.config["seed"]) == ("abcd1234", "tests", 3)
    assert left.step_metrics["*"] == "step"
    assert left.exit_code == 0 and not left.preempting
    (picture,) = [row for row in left.history if "samples/path" in row]
    assert [picture[f"samples/{key}"] for key in ("width", "height", "caption")] == [6, 4, "a prompt"]
    assert picture["step"] == 3
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))


def test_a_stopped_run_is_marked_preempting(tmp_path):
    run = start_wandb(tmp_path, "offline", run_id="abcd1234", name="trial", project="tests")
    assert run is not None
    run.log(1, {"loss/total": 1.0})
    run.close("stopped")
    left = left_by(tmp_path)
    assert left.preempting and left.exit_code == 75


def test_off_leaves_nothing(tmp_path):
    assert start_wandb(tmp_path, "off", run_id=None, name="trial", project="tests") is None
    assert not (tmp_path / "wandb").exists()


def test_auto_with_a_key_but_without_an_answer_is_offline(tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    run = start_wandb(tmp_path, "auto", run_id="abcd1234", name="trial", project="tests")
    assert run is not None and run.mode == "offline"
    run.close("finished")


def test_what_cannot_be_opened_is_done_without(tmp_path, caplog):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    assert start_wandb(in_the_way, "auto", run_id="abcd1234", name="trial", project="tests") is None
    assert "the run goes on without it" in caplog.text
    with pytest.raises(ConfigError, match="offline, but W&B cannot be used"):
        start_wandb(in_the_way, "offline", run_id="abcd1234", name="trial", project="tests")


@pytest.mark.parametrize(
    ("variable", "mode"),
    [("online", "online"), ("run", "online"), ("offline", "offline"), ("dryrun", "offline"), ("shared", "shared"),
     ("disabled", "disabled"), (None, "offline")],
)  # fmt: skip
def test_auto_takes_the_mode_of_wandbs_own_environment_and_the_others_insist(monkeypatch, variable, mode):
    """wandb#8571: a run that its environment disables went online."""
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    # A key, and a server that would answer: nothing but the environment keeps the run from going online.
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert choose_mode("auto") == ("online" if variable is None else mode)
    assert (choose_mode("online"), choose_mode("offline")) == ("online", "offline")


def test_auto_obeys_the_settings_file_that_wandb_disabled_writes(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "settings").write_text("[default]\nmode = disabled\n")
    assert start_wandb(tmp_path, "auto", run_id="a", name="n", project="p") is None
    assert not (tmp_path / "wandb").exists()


def test_online_without_a_key_is_refused_before_the_start_with_the_other_faults(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    command = ["autoencoder", "experiment=smoke", "train.max_steps=0", "tracking.wandb=online"]
    assert main(command) == 2
    shown = capsys.readouterr().err
    assert "tracking.wandb=online, but there is no key for" in shown and "WANDB_API_KEY" in shown
    assert "train.max_steps=0" in shown and not (tmp_path / "runs").exists()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert main(command) == 2 and "there is no key" not in capsys.readouterr().err


def test_a_run_that_breaks_is_given_up_with_one_warning(tmp_path, caplog):
    run = start_wandb(tmp_path, "offline", run_id="abcd1234", name="trial", project="tests")
    assert run is not None
    run.log(1, {"loss/total": 1.0})
    run.close("finished")
    run.log(2, {"loss/total": 1.0})  # closed: nothing happens
    other = start_wandb(tmp_path, "offline", run_id="abcd1234", name="trial", project="tests")
    assert other is not None
    other.log_image(1, "samples", np.zeros((4, 6, 7, 8), dtype=np.uint8))  # no picture has this shape
    other.log(1, {"loss/total": 1.0})
    assert caplog.text.count("goes on without W&B") == 1
    other.close("failed")


def test_importing_the_tracker_does_not_import_wandb():
    code = "import sys, ldmscale.tracking.tracker; print('wandb' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240
    )
    assert done.stdout.strip() == "False"


def test_a_run_without_a_key_asks_nothing_on_a_terminal(tmp_path):
    program = (
        "import sys; from pathlib import Path; from ldmscale.tracking.wandb_run import start_wandb; "
        "assert sys.stdin.isatty() and sys.stderr.isatty(); "
        "from ldmscale.errors import ConfigError\n"
        f"try: start_wandb(Path({str(tmp_path)!r}), 'online', run_id='a', name='n', project='p')\n"
        "except ConfigError: print('refused')"
    )
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-c", program])
    shown = b""
    with open(terminal, "rb", buffering=0) as screen:
        while select.select([screen], [], [], 120)[0]:
            try:
                part = screen.read(4096)
            except OSError:  # the program has ended
                break
            shown += part
            if not part or b"Enter your choice" in shown:
                break
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert b"Enter your choice" not in shown and shown.rstrip().endswith(b"refused"), shown
