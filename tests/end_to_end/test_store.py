"""A run with copies in an S3 store loses its folder and goes on as the same run."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from object_store import ObjectStore

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

COMMAND = [
    "diffusion", "experiment=smoke", "data.workers=0", "run.dir=run", "zero=2", "checkpoint.save_every_steps=2",
    "preview.every_steps=0", "tracking.wandb=off", "train.garbage_every_steps=0", "safety.dry_run=false",
]  # fmt: skip


def test_a_run_whose_folder_is_gone_goes_on_from_the_store(
    host: Any, object_store: ObjectStore, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    keys, run = tmp_path / "keys.jsonl", tmp_path / "run"
    url = object_store.bucket(f"runs-{time.time_ns()}") + "/one"
    command = [*COMMAND, f"checkpoint.url={url}"]
    reach = {"environment": object_store.environment()}
    host.finish([*command, "train.max_steps=4"], keys, **reach)
    identity = json.loads((run / "run.json").read_text())
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Nobody knows whether a run is new while its store does not answer: it must not overwrite the one there.
    shutil.rmtree(run)
    closed = {
        "environment": object_store.environment()
        | {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "x"}
    }
    assert host.run([*command, "train.max_steps=6"], keys, **closed) == 2
    assert f"checkpoint.url={url} cannot be read" in host.log and not (run / "config.yaml").exists()
    # Another configuration is refused by the one in the store, with the field named.
    assert host.run([*command, "train.max_steps=6", "optim.lr=0.5"], keys, **reach) == 2
    assert "optim.lr=0.5, but run was started with" in host.log
    shutil.rmtree(run)
    # The endpoint and the credentials of data.storage hold for the URL, and a transient fault is survived.
    fault_proxy.only, fault_proxy.plan = "^(GET|PUT|POST) .*(manifest|safetensors)", ["503", "reset"]
    options = object_store.options()
    del options["client_kwargs"]["endpoint_url"]
    settings = [
        f"data.storage.endpoint={fault_proxy.endpoint}",
        "data.storage.options=" + json.dumps(options).replace('"', ""),
    ]
    host.finish([*command, "train.max_steps=6", *settings], keys)
    assert fault_proxy.injected == 2
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert after[: len(before)] == before and [line["step"] for line in after] == [1, 2, 3, 4, 5, 6]
    assert json.loads((run / "run.json").read_text())["wandb_id"] == identity["wandb_id"]
    assert "run is gone: the run goes on from" in host.log and "step 4, 32 images seen" in host.log
    assert sorted(p.name for p in run.glob("tokenizer/*"))
