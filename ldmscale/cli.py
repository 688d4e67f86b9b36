"""`ldmscale JOB [group=option] [key=value] ...`: finds the job and turns its outcome into an exit status.

Imports nothing heavy until the job is known, so that --help answers at once. Exit status: 0 finished; 2 the
configuration or the data cannot work; 75 stopped by a signal or a time limit, run me again; anything else failed.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from types import TracebackType

from ldmscale import messages

log = logging.getLogger(__name__)

JOB_SUMMARIES = {
    "quickstart": "the whole pipeline, small, on this machine: shards, autoencoder, latents, diffusion, samples",
    "index": "makes or checks the index of shards and lists what is damaged",
    "autoencoder": "fits the KL or VQ autoencoder; ends by measuring the latent scale",
    "latents": "encodes shards of images into shards of latents",
    "diffusion": "trains the conditional model on latents, or online from images",
    "doctor": "checks this machine or allocation before a run; run.dir=DIR says what happened to a run",
    "wandb-sync": "sends the metrics of a run to W&B, from its metrics.jsonl",
    "submit": "freezes a job and queues it with Slurm: ldmscale submit JOB cluster=NAME ...",
    "evaluate": "measures a model on images that it was not trained on, by a protocol written into the result",
    "sample": "draws images for prompts (a list, a file or standard input)",
    "import": "reads a CompVis checkpoint or a diffusers folder into a folder that sample and export take",
    "export": "writes a run or an imported model as a diffusers folder or a CompVis checkpoint",
}
COMPLETION = ("--shell-completion", "-sc")
# What the same command does after a job was interrupted.
_AGAIN = "the same command starts it again"
RESUMES = {
    "quickstart": "the same command resumes it at the stage that was interrupted",
    "index": "the same command resumes it; the index of every shard that was finished is kept",
    "autoencoder": "the same command resumes it from the newest checkpoint",
    "latents": "the same command resumes it; finished shards are kept",
    "diffusion": "the same command resumes it from the newest checkpoint",
    "doctor": f"{_AGAIN}; nothing is kept",
    "wandb-sync": f"{_AGAIN} and sends the whole run to a new W&B run",
    "submit": f"{_AGAIN}; jobs that it had queued were cancelled",
    "evaluate": f"{_AGAIN} from the first image; no result was written",
    "sample": "the same command resumes it; images that were written are kept",
    "import": f"{_AGAIN}; nothing was written",
    "export": f"{_AGAIN}; nothing was written",
}
USAGE = """usage: ldmscale JOB [group=option ...] [key=value ...] [--config-dir DIR] [--help | --cfg job | --multirun]
       ldmscale --shell-completion install=bash | ldmscale --version"""
FINISHED, FAULTY, FAILED, STOPPED = 0, 2, 1, 75
# Faults of a path that was given; that a file is missing may be a fault of the program, and stays a crash.
CLOSED = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job and return the exit status."""
    if arguments is None:
        sys.excepthook = _report_crash
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        _show(_help())
        return FINISHED if arguments else FAULTY
    if arguments[0] == "--version":
        from ldmscale import __version__

        _show(f"ldmscale {__version__}")
        return FINISHED
    job, *rest = arguments
    if words := [word for word in arguments[:2] if word.split("=")[0] in COMPLETION]:
        return _completion([word for word in arguments if word not in (words[0], *JOB_SUMMARIES)])
    if job not in JOB_SUMMARIES:
        near = difflib.get_close_matches(job, JOB_SUMMARIES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return _tell([f"there is no job {job!r}: {hint}the jobs are {', '.join(JOB_SUMMARIES)}"])
    return _run(job, rest)


def _run(job: str, arguments: list[str]) -> int:
    from ldmscale.distributed.preemption import Interruptible

    with Interruptible() as signals:
        try:
            status = _status(job, arguments)
        except BaseException:
            # Also what the end of other ranks, which got the signal too, has caused.
            if signals.reason is None:
                raise
            status = STOPPED
        if signals.reason is not None and status != FINISHED:
            status = STOPPED
    if status == STOPPED and _is_main():
        by = "" if signals.reason is None else f" by {signals.reason}"
        log.warning("%s was interrupted%s (exit status %d): %s", job, by, STOPPED, RESUMES[job])
    return status


def _status(job: str, arguments: list[str]) -> int:
    """Run one job and turn what a user can mend into its exit status."""
    from ldmscale.config.compose import quiet_hydra
    from ldmscale.config.flags import parse
    from ldmscale.config.folders import config_folder
    from ldmscale.config.overrides import settle_overrides
    from ldmscale.config.secrets import sweep_faults
    from ldmscale.errors import ConfigError, DataError, LdmscaleError, StoppedEarlyError

    try:
        if faults := _expanded_by_the_shell(arguments):
            return _tell(faults)
        # These read their own command line: a job's name follows, or the file of a resolved configuration.
        if job == "submit" or arguments[:1] == ["--frozen"]:
            return _job_function(job)(arguments)
        line = parse(job, arguments)
        if line.flags or line.sweep:
            quiet_hydra()
            words = [*line.flags, *settle_overrides(job, line.overrides, sweep=line.sweep)]
            if faults := sweep_faults(job, words):
                return _tell(faults)
            return _through_hydra(job, words, str(config_folder()))
        return _job_function(job)(line.overrides)
    except (ConfigError, DataError) as error:
        return _tell(error.faults, shared=error.shared)
    except StoppedEarlyError as error:
        _tell([str(error)], shared=error.shared)
        return STOPPED
    except LdmscaleError as error:
        _tell([str(error)], shared=error.shared)
        return FAILED
    except OSError as error:
        if error.errno in CLOSED and error.filename is not None:
            name = os.fsdecode(error.filename)
            fault = f"{name} cannot be read or written ({error.strerror})"
            return _tell([f"{fault}: give this user the right, or give another path"], shared=False)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        _tell(
            [f"{error}: free room there, or give another folder, and run the same command again"],
            shared=False,
        )
        return FAILED


def _completion(words: Sequence[str]) -> int:
    from ldmscale.config.completion import candidates, script
    from ldmscale.errors import ConfigError

    try:
        if list(words) == ["query=bash"]:
            line, point = os.environ.get("COMP_LINE", ""), os.environ.get("COMP_POINT", "")
            _show("\n".join(candidates(line[: int(point)] if point.isdigit() else line, JOB_SUMMARIES)))
        else:
            _show(script(words))
    except ConfigError as error:
        return _tell(error.faults)
    return FINISHED


def _expanded_by_the_shell(arguments: Sequence[str]) -> list[str]:
    """Shards one word each, as a shell makes them of `data.shards=/data/{0..9}.tar` without quotes.

    The last word would win, and a run would read a tenth of its data.
    """
    words = [argument.lstrip("+").partition("=") for argument in arguments]
    plain = [
        word[0].endswith("shards") and re.fullmatch(r"[^*?\[{]+\.tar", word[2]) is not None for word in words
    ]
    keys = [
        before[0]
        for before, after, *both in zip(words, words[1:], plain, plain[1:], strict=False)
        if all(both) and before[0] == after[0] and before[2] != after[2]
    ]
    return [
        f"{key} is given {keys.count(key) + 1} times: quote the pattern ('{key}=/data/{{000..999}}.tar'), or the shell "
        "makes a word of each shard; several sets are a list ('[a.tar,b.tar]')"
        for key in dict.fromkeys(keys)
    ]


def _job_function(job: str) -> Callable[[Sequence[str]], int]:
    function: Callable[[Sequence[str]], int] = importlib.import_module(
        f"ldmscale.jobs.{job.replace('-', '_')}"
    ).main
    return function


def _through_hydra(job: str, arguments: list[str], folder: str) -> int:
    """Flags (--cfg, --multirun, --info, completion) are Hydra's own; jobs of a sweep come back to the job function."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from ldmscale.config.folders import SEARCH_PATH
    from ldmscale.errors import ConfigError

    statuses: list[int] = []
    begun: list[str] = []  # jobs of a sweep

    search = [word for word in arguments if word.lstrip("+").startswith(f"{SEARCH_PATH}=")]

    def task(_: DictConfig) -> None:
        begun.append(job)
        statuses.append(_job_function(job)([*search, *HydraConfig.get().overrides.task]))

    # Hydra takes the name of the program for usage messages and completion from argv.
    before, sys.argv = sys.argv, [os.path.basename(sys.argv[0] or "ldmscale"), *arguments]
    try:
        hydra.main(version_base="1.3", config_path=folder, config_name=job)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).strip().split("\n")[0]) from None
    except RecursionError:
        if begun:
            raise
        raise ConfigError("a configuration file is nested too deeply: give another one") from None
    finally:
        sys.argv = before
    return max(statuses, default=FINISHED)


def _report_crash(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Writes a traceback as Python does, without secrets: libraries put URLs and options into their messages."""
    from traceback import format_exception

    _show(messages.shown("".join(format_exception(kind, error, traceback)).rstrip()), sys.stderr)


def _help() -> str:
    width = max(map(len, JOB_SUMMARIES))
    jobs = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in JOB_SUMMARIES.items())
    return f"{USAGE}\n\njobs:\n{jobs}\n\n`ldmscale JOB --help` shows a job's groups and settings; `--cfg job` its configuration."


def _tell(faults: Sequence[str], *, shared: bool = True) -> int:
    """Say every fault and return the status of work that cannot be done as asked.

    Rank 0 speaks for all where they share the fault; a fault of one rank alone is told by that rank.
    """
    if _is_main() or not shared:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        count += "" if _is_main() else f" on rank {_rank()}"
        _show(
            "\n".join([f"ldmscale cannot do this, {count}:", *map(messages.entry, faults)]),
            sys.stderr,
        )
    return FAULTY


def _rank() -> str:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def _is_main() -> bool:
    return _rank() == "0"


def _show(text: str, stream: object = None) -> None:
    # The command line's own answers are its output, not log records.
    (sys.stdout if stream is None else sys.stderr).write(text + "\n")
