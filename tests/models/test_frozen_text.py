"""A frozen text encoder gives what transformers gives, reads as the trained one does, and is no part of the denoiser."""

from __future__ import annotations

import json
import shutil

import pytest
import text_folders
import torch
from transformers import AutoTokenizer, CLIPModel, CLIPTextModel, T5EncoderModel

from ldmscale.builders.networks import bare_text_encoder, open_text_encoder
from ldmscale.config import FrozenTextConfig
from ldmscale.data.tokenizers.pretrained import EncoderTokenizer, keep
from ldmscale.errors import ConfigError, DataError
from ldmscale.models.conditions import Conditions
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.unet import UNet

CAPTIONS = ["a red circle", "", "Blue  square, zzz! " * 9, "Ünïcode"]
REFERENCE = {"clip": CLIPTextModel, "t5": T5EncoderModel}


@pytest.fixture(scope="module", params=["clip", "t5"])
def config(request, tmp_path_factory) -> FrozenTextConfig:
    folder = text_folders.make(request.param, tmp_path_factory.mktemp(request.param))
    return FrozenTextConfig(request.param, str(folder), text_folders.WIDTH, text_folders.TOKENS)


def other(config: FrozenTextConfig, **changed) -> FrozenTextConfig:
    return FrozenTextConfig(**{**vars(config), **changed})


@pytest.fixture
def tokenizer(config, tmp_path) -> EncoderTokenizer:
    keep(config.path, tmp_path / "kept")
    return EncoderTokenizer.load(tmp_path / "kept", config.max_tokens)


def test_token_ids_are_those_of_the_encoders_own_tokenizer(config, tokenizer):
    theirs = AutoTokenizer.from_pretrained(config.path)
    expected = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=16, return_tensors="np")
    assert (tokenizer.encode(CAPTIONS) == expected["input_ids"]).all()
    assert tokenizer.encode([]).shape == (0, 16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_context_is_what_transformers_computes(config, tokenizer, dtype):
    ids = torch.from_numpy(tokenizer.encode(CAPTIONS))
    encoder = open_text_encoder(other(config, dtype=dtype)).train()  # an engine would ask for it
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    theirs = REFERENCE[config.kind].from_pretrained(config.path, dtype=wanted).eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids).last_hidden_state
    found = encoder(ids)
    assert found.dtype == torch.float32 and not found.requires_grad and expected.dtype == wanted
    assert torch.equal(found, expected.float())
    assert expected.float().std(dim=0).max() > 0.01  # captions differ
    with pytest.raises(ValueError, match="takes 16"):
        encoder(torch.zeros(1, 17, dtype=torch.int64))


def test_the_text_half_of_a_whole_clip_is_read(tmp_path):
    folder = text_folders.make("clip", tmp_path / "text")
    config = FrozenTextConfig("clip", str(folder), 64, 16)
    whole = CLIPTextModel.from_pretrained(folder)
    from transformers import CLIPConfig, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    both = CLIPModel(CLIPConfig(text_config=whole.config.to_dict(), vision_config=vision.to_dict()))
    missing, _ = both.text_model.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    both.save_pretrained(tmp_path / "both")
    found = open_text_encoder(other(config, path=str(tmp_path / "both")))
    assert found.digest() == open_text_encoder(config).digest()
    reseeded = text_folders.make("clip", tmp_path / "reseeded", seed=1)
    assert found.digest() != open_text_encoder(other(config, path=str(reseeded))).digest()


@pytest.mark.parametrize("null", ["tokens", "learned"])
def test_a_denoiser_reads_with_it_and_does_not_own_it(config, tokenizer, null):
    torch.manual_seed(0)
    unet = UNet(
        in_channels=4, out_channels=4, channels=32, channel_mult=(1,), blocks_per_level=1, attention_levels=(0,), heads=2,
        context_dim=64,
    )  # fmt: skip
    empty = torch.from_numpy(tokenizer.encode([""])[0])
    encoder = open_text_encoder(config)
    network = Denoiser(unet, encoder, empty, null_condition=null)
    assert network.reads_text is encoder
    names = {name for name, _ in network.named_parameters()} | set(network.state_dict())
    assert all(name.startswith(("unet.", "null_")) for name in names)
    network.to(torch.bfloat16)
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}
    network.float()
    ids = torch.from_numpy(tokenizer.encode(["red", "blue circle"]))
    encoded = network.encode(Conditions(token_ids=ids), torch.tensor([False, True])).context
    expected = encoder(ids)
    expected[1] = encoder(empty[None])[0] if null == "tokens" else network.null_context().detach()
    assert float((encoded.detach() - expected).abs().max()) < 1e-6
    x = torch.randn(2, 4, 8, 8)
    network(x, torch.tensor([3, 4]), Conditions(token_ids=ids)).square().mean().backward()
    assert all(weight.grad is None for weight in encoder.parameters())


def test_the_bare_encoder_has_the_shapes_and_no_memory(config):
    with torch.device("meta"):
        bare = bare_text_encoder(config)
    whole = open_text_encoder(config)
    assert {k: v.shape for k, v in bare.state_dict().items()} == {
        k: v.shape for k, v in whole.state_dict().items()
    }
    assert all(weight.is_meta for weight in bare.parameters())


def test_what_cannot_be_opened_is_told(config, tmp_path):
    wrong = other(config, kind="t5" if config.kind == "clip" else "clip")
    with pytest.raises(ConfigError, match=r"text_encoder\.(path|width)="):
        open_text_encoder(wrong)
    with pytest.raises(ConfigError, match=r"give text_encoder\.width=64"):
        open_text_encoder(other(config, width=32))
    with pytest.raises(DataError, match="gives no tokenizer"):
        keep(str(tmp_path), tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_a_model_in_several_files_is_opened_where_all_of_them_lie_in_its_folder(config, tmp_path):
    folder = tmp_path / "split"
    REFERENCE[config.kind].from_pretrained(config.path).save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    split = other(config, path=str(folder))
    whole, found = (open_text_encoder(each).state_dict() for each in (config, split))
    assert len(set(values["weight_map"].values())) > 1 and all(
        torch.equal(found[k], v) for k, v in whole.items()
    )
    key, name = next(iter(values["weight_map"].items()))
    shutil.copy(folder / name, tmp_path / name)  # so that nothing but its place is wrong
    for elsewhere in (f"../{name}", str(tmp_path / name), 5):
        index.write_text(json.dumps({**values, "weight_map": {**values["weight_map"], key: elsewhere}}))
        with pytest.raises(ConfigError, match="expected a plain file name"):
            open_text_encoder(split)
