"""What a person sees, and what is written into the log of each rank."""

import io
import logging
import subprocess
import sys
import warnings

import pytest
from rich.console import Console

from ldmscale.distributed.environment import Ranks
from ldmscale.tracking.console import ProgressDisplay
from ldmscale.tracking.logs import set_up_logging

METRICS = {
    "loss/total": 0.25,
    "throughput/images_per_second": 53.24,
    "lr": 1e-4,
    "time/data_wait_share": 0.02,
}


@pytest.fixture
def logging_as_before():
    root = logging.getLogger()
    handlers, level, filters = list(root.handlers), root.level, list(warnings.filters)
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)
    warnings.filters[:] = filters


def test_lines_in_a_log_are_plain_and_aligned():
    stream = io.StringIO()
    display = ProgressDisplay(1000, "trial", Console(file=stream, width=40))
    display.start(0)
    display.show(5, METRICS)
    display.show(1000, {**METRICS, "loss/total": 12.5, "throughput/images_per_second": 1053.2})
    display.close()
    first, second = stream.getvalue().splitlines()
    assert first.startswith("trial    5/1000  loss 0.2500   images/s 53.2")
    assert "lr 1.00e-04  wait 2%" in first and "left 0:0" in first
    assert second.startswith("trial 1000/1000  loss 12.5000")
    assert first.index("images/s") == second.index("images/s") and first.index("left") == second.index("left")
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar_with_the_metrics():
    stream = io.StringIO()
    display = ProgressDisplay(10, "trial", Console(file=stream, force_terminal=True, width=120))
    display.start(4)
    display.show(5, METRICS)
    display.advance(6)
    display.close()
    shown = stream.getvalue()
    assert "\x1b" in shown and "loss 0.2500" in shown and "6/10" in shown


def test_a_bar_fits_80_columns():
    stream = io.StringIO()
    display = ProgressDisplay(
        1_000_000, "ldm_text2img_1p45b", Console(file=stream, force_terminal=True, width=80)
    )
    display.start(0)
    display.show(390_000, METRICS)
    display.close()
    assert "390000/1000000" in stream.getvalue() and "wait 2%" in stream.getvalue()
    assert "…" not in stream.getvalue()


def test_metrics_that_nobody_watches_make_no_line():
    stream = io.StringIO()
    display = ProgressDisplay(10, "trial", Console(file=stream))
    display.show(10, {"latents/scale": 0.2})
    assert stream.getvalue() == ""


def test_each_rank_appends_to_its_own_file(tmp_path, logging_as_before):
    for attempt in ("first", "second"):
        set_up_logging(tmp_path, Ranks(rank=1, size=2, local_rank=1, local_size=2))
        logging.getLogger("ldmscale.somewhere").info("%s attempt", attempt)
        logging.getLogger("ldmscale.somewhere").debug("not shown")
    text = (tmp_path / "logs" / "rank_00001.log").read_text()
    assert text.index("first attempt") < text.index("second attempt")
    assert text.count("attempt") == 2  # a second set-up replaces the handlers, it does not double them
    assert "r1 INFO ldmscale.somewhere:" in text and "not shown" not in text


def test_warnings_go_to_the_log_and_those_of_libraries_insides_do_not(tmp_path, logging_as_before):
    set_up_logging(tmp_path, Ranks())
    warnings.warn("mind the gap", UserWarning, stacklevel=1)
    warnings.warn("`all_gather_into_tensor` is to be renamed", FutureWarning, stacklevel=1)
    text = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert "mind the gap" in text and "all_gather" not in text


SPEAK = """
import logging, sys
from ldmscale.distributed.environment import Ranks
from ldmscale.tracking.logs import set_up_logging
set_up_logging(None, Ranks(rank=int(sys.argv[1]), size=2, local_rank=int(sys.argv[1]), local_size=2))
logging.getLogger("x").info("for your information")
logging.getLogger("x").error("it is broken")
"""


@pytest.mark.parametrize(("rank", "informed"), [(0, True), (1, False)])
def test_one_rank_informs_and_all_complain(rank, informed):
    done = subprocess.run(
        [sys.executable, "-c", SPEAK, str(rank)], capture_output=True, text=True, check=True, timeout=240
    )
    assert ("for your information" in done.stderr) == informed
    assert "it is broken" in done.stderr and done.stdout == ""
