"""Ranks and rendezvous from the variables of torchrun and Slurm."""

import os
import pty
import subprocess
import sys
from contextlib import suppress

import pytest

from ldmscale.distributed.environment import (
    LAUNCHER,
    Ranks,
    export_rendezvous,
    first_host,
    in_slurm_step,
    read_ranks,
    rendezvous,
    tasks_on_node,
)
from ldmscale.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_JOB_NODELIST": "gpu[007-009,12]",
}


def test_without_variables_there_is_one_rank():
    assert read_ranks({}) == Ranks(rank=0, size=1, local_rank=0, local_size=1, node=0)
    assert read_ranks({}).is_main


def test_torchruns_variables_are_read():
    assert read_ranks(TORCHRUN) == Ranks(rank=5, size=8, local_rank=1, local_size=4, node=1)


def test_slurms_variables_are_read_inside_a_step():
    assert read_ranks(SLURM) == Ranks(rank=5, size=7, local_rank=1, local_size=2, node=2)


def test_torchrun_inside_a_slurm_task_counts():
    assert read_ranks(SLURM | TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}) == read_ranks(TORCHRUN)


def test_our_launcher_inside_a_slurm_task_counts():
    assert read_ranks(SLURM | TORCHRUN | {LAUNCHER: str(os.getppid())}) == read_ranks(TORCHRUN)


def test_variables_of_torchrun_that_say_the_same_as_slurm_are_taken():
    same = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert read_ranks(SLURM | same).rank == 5


@pytest.mark.parametrize("left_over", [{"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "5", "WORLD_SIZE": "8"}])
def test_left_over_variables_of_torchrun_do_not_make_a_slurm_task_another_rank(left_over):
    with pytest.raises(ConfigError, match=r"task 5 of 7 .*unset RANK WORLD_SIZE"):
        read_ranks(SLURM | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} | left_over)


_ASKS = """
import os, sys
sys.path.insert(0, {checkout!r})
from ldmscale.distributed.environment import in_slurm_step, read_ranks
open(sys.argv[1], "w").write(f"{{in_slurm_step()}} {{read_ranks().size}}")
"""


@pytest.mark.parametrize(
    ("task", "typed", "answer"),
    [
        (["bash", "--norc", "-i"], True, "False 1"),  # srun -n 4 --pty bash
        (["-bash", "--norc"], True, "False 1"),  # a login shell
        (["bash", "-c", "python ask.py answer; exit"], False, "True 4"),  # srun -n 4 --pty bash -c ...
        (["bash", "ask.sh"], False, "True 4"),
    ],
)
def test_a_command_in_the_shell_of_srun_pty_is_no_rank(tmp_path, task, typed, answer):
    (tmp_path / "ask.py").write_text(_ASKS.format(checkout=os.getcwd()))
    (tmp_path / "ask.sh").write_text("python ask.py answer\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    env = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
    }
    env |= {"SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_PTY_PORT": "40000"}
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", task, env | {"SLURM_TASK_PID": str(os.getpid())})
    try:
        if typed:
            os.write(terminal, b"python ask.py answer; exit\n")
        with suppress(OSError):  # the terminal of a process that has ended
            while os.read(terminal, 4096):
                pass
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    assert (tmp_path / "answer").read_text() == answer


def test_a_step_that_is_started_from_the_shell_of_srun_pty_has_ranks():
    """Its tasks inherit SLURM_PTY_PORT, but have no terminal: 22.05 gives them this environment."""
    with subprocess.Popen(["bash"], stdin=subprocess.PIPE, start_new_session=True) as task:
        env = SLURM | {
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
            "SLURM_PTY_PORT": "40000",
        }
        assert in_slurm_step(env | {"SLURM_TASK_PID": str(task.pid)})
        task.stdin.close()


@pytest.mark.parametrize("step", ["4294967290", "4294967291", None])
def test_a_shell_of_slurm_is_no_rank(step):
    env = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    env |= {"SLURM_STEP_ID": step} if step else {}
    assert not in_slurm_step(env)
    assert read_ranks(env) == Ranks()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RANK": "8"}, "RANK=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "WORLD_SIZE=8"),
        ({"RANK": "0"}, "LOCAL_RANK=1"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE"),
        ({"RANK": "-1"}, "RANK"),
    ],
)
def test_contradicting_variables_are_refused_by_name(change, named):
    with pytest.raises(ConfigError, match=named):
        read_ranks(TORCHRUN | change)


def test_every_missing_variable_is_named():
    with pytest.raises(ConfigError) as caught:
        read_ranks({"RANK": "0"})
    assert len(caught.value.faults) == 2
    assert "WORLD_SIZE" in str(caught.value) and "LOCAL_RANK" in str(caught.value)


def test_slurm_gives_the_rendezvous():
    found = rendezvous(read_ranks(SLURM), SLURM)
    assert found["MASTER_ADDR"] == "gpu007"
    assert found["MASTER_PORT"] == "24711"
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == (
        "5",
        "7",
        "1",
        "2",
    )


def test_two_steps_of_a_slurm_job_get_two_ports():
    ports = {
        rendezvous(read_ranks(SLURM), SLURM | {"SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for step in range(4)
    }
    assert len(ports) == 4


def test_a_rendezvous_that_is_given_is_kept():
    env = dict(SLURM, MASTER_ADDR="other", MASTER_PORT="1234")
    export_rendezvous(read_ranks(env), env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["RANK"]) == ("other", "1234", "5")


def test_several_nodes_without_rendezvous_are_refused_with_both_names():
    env = {key: value for key, value in TORCHRUN.items() if not key.startswith("MASTER")}
    with pytest.raises(ConfigError) as caught:
        rendezvous(read_ranks(env), env)
    assert "MASTER_ADDR" in str(caught.value) and "MASTER_PORT" in str(caught.value)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("gpu[007-009,12],login", "gpu007"),
        ("a,b", "a"),
        ("rack[1-2]n[03,05]-x", "rack1n03-x"),
        ("c3-[10,12]", "c3-10"),
        ("n[1-2].cluster.org,m", "n1.cluster.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "a[", "a[]", "[x]"])
def test_what_is_no_node_list_is_refused(nodelist):
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        first_host(nodelist)


def test_tasks_per_node_in_slurms_short_form():
    assert [tasks_on_node("2(x3),1", node) for node in range(4)] == [2, 2, 2, 1]
    with pytest.raises(ConfigError, match="SLURM_NODEID is 4"):
        tasks_on_node("2(x3),1", 4)
    with pytest.raises(ConfigError, match="expected a form"):
        tasks_on_node("2*3", 0)
