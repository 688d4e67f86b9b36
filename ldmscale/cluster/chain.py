"""The three stages as one chain of jobs: which override goes to which stage, and where each finds the one before.

    ldmscale submit pipeline cluster=gpu8 run.name=laion data.shards='/data/{00000..41454}.tar' data.image_size=256 \\
        autoencoder:experiment=autoencoder_kl_f8 diffusion:experiment=ldm_text2img_1p45b latents:cluster.nodes=4

The run folder is the diffusion model's, as in the quickstart; autoencoder/ and latents/ lie within.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldmscale.config import JOBS
from ldmscale.config.folders import SEARCH_PATH
from ldmscale.config.overrides import setting, text_of, typed_keys
from ldmscale.errors import ConfigError

STAGES = ("autoencoder", "latents", "diffusion")


@dataclass(frozen=True)
class Stage:
    """One job of a submission; `awaited` are folders that an earlier one will make."""

    job: str
    overrides: list[str]
    awaited: tuple[Path, ...]
    name: str | None = None  # of the job in the queue; None: that of the folder of its results


def stages_of(words: Sequence[str]) -> tuple[list[Stage], list[str]]:
    """The stages of `submit pipeline WORDS`, and the faults of words that no stage knows.

    Raises ConfigError where the run has no name.
    """
    own: dict[str, list[str]] = {job: [] for job in STAGES}
    shared: list[str] = []
    faults = []
    for word in words:
        stage, colon, rest = word.partition(":")
        if colon and "=" not in stage:
            if stage in own:
                own[stage].append(rest)
            else:
                faults.append(f"{word}: {stage} is no stage of the pipeline; expected {', '.join(STAGES)}")
        else:
            shared.append(word)
    folder = _folder(shared)
    if folder is None:
        faults.append("run.name is not set: the pipeline needs one; give run.name=NAME")
        raise ConfigError(faults)
    where = {"autoencoder": folder / "autoencoder", "latents": folder / "latents", "diffusion": folder}
    places = {
        "autoencoder": [setting("run.dir", where["autoencoder"])],
        "latents": [
            setting("first_stage.path", where["autoencoder"]),
            setting("latents.path", where["latents"]),
        ],
        "diffusion": [
            setting("run.dir", folder),
            setting("first_stage.path", where["autoencoder"]),
            setting("data.shards", where["latents"] / "*.tar"),
        ],
    }
    stages = []
    placed = ("run.dir", "first_stage.path", "latents.path")
    for job in STAGES:
        known = {*typed_keys(JOBS[job]), "cluster", "seed", SEARCH_PATH}
        fits = [word for word in shared if _key(word) in known or _key(word).startswith("cluster.")]
        if job == "diffusion":  # which reads latents, and the held-out images
            fits = [
                word for word in fits if _key(word) not in ("data.shards", "data.image_size", "data.crop")
            ]
        fits = [word for word in fits if _key(word) not in placed]
        stages.append(
            Stage(
                job,
                [*fits, *places[job], *own[job]],
                tuple(where.values()),
                f"{folder.absolute().name}-{job}",
            )
        )
    used = {word for stage in stages for word in stage.overrides}
    faults += [
        f"{word}: no stage of the pipeline knows {_key(word)}; write STAGE:{word} for one stage's own group or key"
        for word in shared
        if word not in used and _key(word) not in placed
    ]
    return stages, faults


def _folder(words: Sequence[str]) -> Path | None:
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if "run.dir" in given:
        return Path(text_of(given["run.dir"]))
    return Path("runs") / text_of(given["run.name"]) if "run.name" in given else None


def _key(word: str) -> str:
    return word.split("=")[0].lstrip("+~")
