"""A folder of a tokenizer or a text encoder that brings Python code: it never runs, whatever standard input answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from text_folders import TOKENS, WIDTH, make

CHECKOUT = Path(__file__).resolve().parents[3]
# Opens each folder as runs do; prints how each attempt ended.
PROGRAM = """
import json, sys
from ldmscale.builders.networks import bare_text_encoder, open_text_encoder
from ldmscale.config import FrozenTextConfig
from ldmscale.data.tokenizers.bert import Tokenizer
from ldmscale.data.tokenizers.pretrained import keep
evil, place, width, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
config = FrozenTextConfig(kind="clip", path=evil, width=width, max_tokens=tokens)
ends = []
for attempt in (
    lambda: keep(evil, place + "/kept"),
    lambda: Tokenizer.load(evil, 16),
    lambda: open_text_encoder(config),
    lambda: bare_text_encoder(config),
):
    try:
        attempt()
        ends.append("opened")
    except Exception as error:
        ends.append(f"{type(error).__name__}: {error}")
print(json.dumps(ends))
"""


@pytest.mark.timeout(300)
def test_code_in_a_folder_never_runs_though_standard_input_says_yes(tmp_path: Path) -> None:
    folder, ran = make("clip", tmp_path / "evil"), tmp_path / "RAN"
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenization_evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass T: pass\nC = M = T\n")
    tokenizer = {
        "tokenizer_class": "T",
        "auto_map": {"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "config.json").read_text())
    autos = ("AutoConfig", "AutoModel", "AutoTokenizer", "CLIPTextModel")
    settings["auto_map"] = {auto: "tokenization_evil.T" for auto in autos}
    (folder / "config.json").write_text(json.dumps(settings))

    environment = os.environ | {
        "PYTHONPATH": str(CHECKOUT),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path), str(WIDTH), str(TOKENS)]
    done = subprocess.run(
        command, input="y\n" * 20, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert not ran.exists() and not list(tmp_path.rglob("tokenization_evil*.pyc"))
    kept, loaded, opened, bare = json.loads(done.stdout.splitlines()[-1])
    assert kept.startswith("DataError: ") and "which ldmscale never runs" in kept
    assert loaded.startswith("DataError: ")
    assert (opened, bare) == ("opened", "opened")  # of the encoder the library has code of its own
    assert "[y/N]" not in done.stdout + done.stderr
