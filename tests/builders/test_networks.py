"""From configuration to networks: `build`."""

import pytest

import ldmscale
from ldmscale.errors import ConfigError


def test_build_gives_the_untrained_parts_of_an_experiment():
    parts = ldmscale.build("ldm_text2img_1p45b")
    assert sum(p.numel() for p in parts.unet.parameters()) == 872_300_484
    assert sum(p.numel() for p in parts.autoencoder.parameters()) == 83_653_863
    assert sum(p.numel() for p in parts.text_encoder.parameters()) == 581_994_042 - 39_098_682
    with pytest.raises(ConfigError, match="choose one of"):
        ldmscale.build("ldm_text2img_1p45c")
