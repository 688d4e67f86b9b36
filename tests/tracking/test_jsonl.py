"""metrics.jsonl: whole lines, no double points, valid JSON."""

import json

import pytest

from ldmscale.tracking.metrics import MetricsFile


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path):
    return [line["step"] for line in lines(path)]


def test_each_line_is_there_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(1, {"loss/total": 0.5, "images_seen": 8})
    assert lines(path) == [{"step": 1, "loss/total": 0.5, "images_seen": 8}]
    file.close()


def test_a_resume_drops_the_steps_that_will_be_taken_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in range(1, 6):
        first.write(step, {"loss/total": float(step)})
    first.close()

    second = MetricsFile(path)
    second.resume_from(3)
    second.write(4, {"loss/total": 40.0})
    second.close()
    assert [(line["step"], line["loss/total"]) for line in lines(path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_beginning_anew_drops_everything(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(1, {})
    file.resume_from(0)
    file.close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("tail", [b'{"step": 2, "loss/to', b"{", b"\xff\xfe"])
def test_a_torn_last_line_does_not_spoil_the_next(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    file = MetricsFile(path)
    file.write(2, {})
    file.close()
    assert steps(path) == [1, 2]


def test_damaged_lines_do_not_survive_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnonsense\n{"loss": 3}\n[]\n{"step": 2}\n')
    file = MetricsFile(path)
    file.resume_from(5)
    file.close()
    assert steps(path) == [1, 2]


def test_values_that_are_no_numbers_stay_readable(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(1, {"a": float("nan"), "b": float("inf"), "c": float("-inf")})
    file.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    (line,) = [json.loads(text, parse_constant=refuse) for text in path.read_text().splitlines()]
    assert line == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
