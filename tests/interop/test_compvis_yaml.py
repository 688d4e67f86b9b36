"""The yaml of an export tells CompVis' LatentDiffusion how each condition enters, as the published ones do."""

from __future__ import annotations

import pytest
from families import FAMILIES, TEXT, Family, first_stage, model_of, unet

from ldmscale.interop.compvis_config import written

HYBRID = Family(unet(in_channels=7, heads=8, context_dim=32), first_stage(), TEXT)
INPAINTING = Family(unet(in_channels=9, heads=8, attention_levels=()), first_stage())
RETRIEVAL = Family(unet(heads=8, context_dim=32), first_stage())
CASES = {  # conditioning_key, cond_stage_key, class of cond_stage_config
    "text": (FAMILIES["text2img"], "crossattn", "caption", "BERTEmbedder"),
    "class": (FAMILIES["class_conditional"], "crossattn", "class_label", "ClassEmbedder"),
    "unconditional": (FAMILIES["faces"], None, "image", "__is_unconditional__"),
    "semantic": (FAMILIES["semantic"], "concat", "segmentation", "SpatialRescaler"),
    "superres": (FAMILIES["superres"], "concat", "LR_image", "Identity"),
    "inpainting": (INPAINTING, "concat", "masked_image", "__is_first_stage__"),
    "retrieval": (RETRIEVAL, "crossattn", "embeddings", "Identity"),
    "caption and small image": (HYBRID, "hybrid", "caption", "BERTEmbedder"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_condition_enters_as_published(name):
    family, enters, key, reader = CASES[name]
    params = written(model_of(family))["model"]["params"]
    assert params.get("conditioning_key") == enters and params["cond_stage_key"] == key
    stage = params["cond_stage_config"]
    assert (stage if isinstance(stage, str) else stage["target"].split(".")[-1]) == reader
    if name == "class":  # ClassEmbedder looks for its labels under a key of its own
        assert stage["params"]["key"] == key
