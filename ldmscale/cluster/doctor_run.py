"""A run that stopped, failed or hangs: what its folder tells, and what follows from it. Needs no device and no ranks."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldmscale import messages
from ldmscale.checkpoint.folders import complete_checkpoints
from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.checkpoint.shards import Reader
from ldmscale.cluster.submission import read_record
from ldmscale.config import SafetyConfig
from ldmscale.distributed.watchdog import Beat, odd_ranks, read_beats
from ldmscale.errors import CheckpointError, ConfigError, DataError
from ldmscale.storage.lease import newest_holder
from ldmscale.storage.plain_values import Count, checked, parsed_object

_TAIL_BYTES = 64 * 1024
_ERROR = re.compile(r"\b(ERROR|CRITICAL)\b|^\s*[\w.]*(Error|Exception)\b: |^\s*Traceback")
_RANK_LOG = re.compile(r"rank_[0-9]{5,9}\.log")
_SHOWN_RANKS = 8


def examine_run(folder: RunFolder) -> Findings:
    """What happened to the run in `folder`. Raises ConfigError where it is no run folder."""
    config = folder.config()
    found = Findings()
    identity = folder.identity()
    last = _last_metrics(folder.path / "metrics.jsonl")
    train = config.get("train")
    target = train.get("max_steps") if isinstance(train, dict) else None
    attempts = int(identity.get("attempts", 0))
    found.values["run"] = (
        f"{config.get('job', '?')}, {attempts} starts, the last on {identity.get('started', '?')}"
    )
    if last is not None:
        age = time.time() - (folder.path / "metrics.jsonl").stat().st_mtime
        found.values["progress"] = f"step {last['step']} of {target}, last line of metrics {_ago(age)} ago"
    _checkpoints(folder, found)
    finished = identity.get("finished_step")
    if finished is not None:
        found.values["state"] = f"finished at step {finished}"
        return found
    _holder(folder, found)
    fault = identity.get("fault")
    if isinstance(fault, list) and fault:
        found.values["state"] = f"ended with a fault that the same command meets again: {fault[0]}"
    _beats(folder, attempts, _beat_seconds(config), found)
    _errors(folder.path / "logs", found)
    _ledger(folder.ledger, found)
    _submissions(folder.path, found)
    return found


def _beat_seconds(config: Mapping[str, Any]) -> float:
    """The run's own interval: a rank is silent after a number of beats, however short they are."""
    safety = config.get("safety")
    found = safety.get("heartbeat_seconds") if isinstance(safety, dict) else None
    return float(found) if isinstance(found, (int, float)) else SafetyConfig.heartbeat_seconds


def _checkpoints(folder: RunFolder, found: Findings) -> None:
    complete = complete_checkpoints(folder.checkpoints)
    torn = [
        p.name
        for p in folder.checkpoints.glob("*")
        if p.is_dir() and p not in complete and not p.name.startswith(".")
    ]
    names = ", ".join(path.name for path in complete) or "none"
    found.values["checkpoints"] = names
    for checkpoint in reversed(complete):
        try:
            wrong = Reader(checkpoint).wrong_hashes()
        except (CheckpointError, OSError) as error:
            wrong = [str(error)]
        if not wrong:
            found.values["checkpoints"] += f"; {checkpoint.name} was read whole, and its checksums hold"
            break
        found.warnings.append(f"{checkpoint.name} does not hold ({wrong[0]}): a resume takes the one before")
    else:
        found.warnings.append(
            "every complete checkpoint is damaged: a resume refuses; move them away to begin at step 0"
            if complete
            else "there is no complete checkpoint: a resume begins at step 0"
        )
    if torn:
        found.warnings.append(f"left behind by an interrupted save, and ignored: {', '.join(sorted(torn))}")


def _holder(folder: RunFolder, found: Findings) -> None:
    try:
        holder = newest_holder(folder.path / "lease") if (folder.path / "lease").is_dir() else None
    except DataError as error:
        found.faults.append(str(error))
        return
    if holder is None:
        found.values["state"] = "never started"
    elif holder.released:
        found.values["state"] = "ended by itself, unfinished: start the same command again"
    elif holder.dead:
        found.values["state"] = f"was killed: {holder.told()} is gone; start the same command again"
    else:
        found.values["state"] = f"held by {holder.told()}"


def _beats(folder: RunFolder, attempt: int, beat_seconds: float, found: Findings) -> None:
    beats = [beat for beat in read_beats(folder.path) if beat.attempt == attempt]
    if not beats:
        return
    size = max(beat.rank for beat in beats) + 1
    places = Counter((beat.step, beat.phase) for beat in beats)
    told = [f"{count} in phase {phase} after step {step}" for (step, phase), count in places.most_common(4)]
    youngest = min(beat.age_seconds for beat in beats)
    found.values["ranks"] = f"{len(beats)}: {', '.join(told)}; last heard of {_ago(youngest)} ago"
    if {beat.phase for beat in beats} == {"end"}:
        return
    # Seen from the last sign of life of any rank: after a crash all of them are silent.
    then = [Beat(**{**vars(beat), "age_seconds": beat.age_seconds - youngest}) for beat in beats]
    found.values["odd ranks"] = odd_ranks(then, size, attempt, beat_seconds)


def _errors(logs: Path, found: Findings) -> None:
    """The last error of each rank, those that fewest ranks share first: the first to fail fails alone."""
    last: dict[int, str] = {}
    for path in sorted(logs.glob("rank_*.log")):
        if _RANK_LOG.fullmatch(path.name) is None:
            continue
        lines = [line for line in _tail(path).splitlines() if _ERROR.search(line)]
        if lines:
            last[int(path.stem.removeprefix("rank_"))] = lines[-1].strip()[:300]
    kinds = Counter(_kind(text) for text in last.values())
    ordered = sorted(last, key=lambda rank: (kinds[_kind(last[rank])], rank))
    for rank in ordered[:_SHOWN_RANKS]:
        found.values[f"rank {rank} said"] = last[rank]
    stacks = sorted(path.name for path in logs.glob("stacks_*.txt"))
    if stacks:
        found.values["stacks"] = f"{len(stacks)} ranks left theirs when the run hung: {logs}/{stacks[0]} ..."


def _ledger(path: Path, found: Findings) -> None:
    if path.exists() and (lines := _tail(path).splitlines()[1:]):
        reasons = Counter(_field(line, "reason").split(":")[0][:60] for line in lines)
        found.values["data ledger"] = ", ".join(
            f"{count} x {reason}" for reason, count in reasons.most_common(3)
        )


def _submissions(folder: Path, found: Findings) -> None:
    records = sorted((folder / "submissions").glob("[0-9]*/submission.json"))
    if records:
        try:
            record = read_record(records[-1])
        except ConfigError as error:
            found.faults.append(str(error))
            return
        found.values["submission"] = (
            f"{records[-1].parent.name}, Slurm job {record.get('slurm_job', 'not queued')}"
        )
        outputs = sorted((folder / "logs").glob("slurm_*.out"), key=lambda path: path.stat().st_mtime)
        said = [line for line in _tail(outputs[-1]).splitlines() if " ldmscale: " in line] if outputs else []
        if said:
            found.values["Slurm said last"] = said[-1][:300]
    bad = folder / "bad_nodes.txt"
    if bad.exists() and (names := sorted(set(bad.read_text(errors="replace").split()))):
        found.warnings.append(f"nodes found bad, left out of requeues: {', '.join(names)} ({bad})")


def _last_metrics(path: Path) -> dict[str, Any] | None:
    for line in reversed(_tail(path).splitlines()):
        try:
            values = parsed_object(line)
            checked(Count, values.get("step"))
        except ValueError:
            continue
        return values
    return None


def _tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _field(line: str, name: str) -> str:
    try:
        return str(parsed_object(line).get(name, "?"))
    except ValueError:
        return "?"


def _kind(text: str) -> str:
    return re.sub(r"[\d.:\-/]+", "#", text)


def _ago(seconds: float) -> str:
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{max(0.0, seconds) / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


@dataclass
class Findings:
    """Values to show, `faults` that keep a run from working, and `warnings` about what will hurt it."""

    values: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def told(self) -> str:
        """All of it, in aligned lines. Names and words of files stay in the line that they belong to."""
        width = max((len(name) for name in self.values), default=0)
        lines = [f"  {name:<{width}}  {messages.name(value)}" for name, value in self.values.items()]
        lines += [f"  warning: {messages.name(warning)}" for warning in self.warnings]
        lines += [f"  fault: {messages.name(fault)}" for fault in self.faults]
        return "\n".join(lines)
