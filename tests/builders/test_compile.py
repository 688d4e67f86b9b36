"""Compiled blocks compute what written ones do; where there is no compiler, that is said before anything starts."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

from ldmscale.builders.compile import compile_blocks
from ldmscale.errors import ConfigError
from ldmscale.models.layers import Checkpointing, ResnetBlock
from ldmscale.models.text_encoder import TextTransformer
from ldmscale.models.unet import UNet

CPU = torch.device("cpu")


class Joint(nn.Module):
    """Every kind of block but plain attention: residual, spatial transformer, text layer."""

    def __init__(self, checkpointing: Checkpointing) -> None:
        super().__init__()
        self.text = TextTransformer(vocab_size=11, max_tokens=5, width=16, layers=2, heads=2, head_channels=8)
        self.unet = UNet(
            in_channels=4, out_channels=4, channels=32, channel_mult=(1, 2), blocks_per_level=1, attention_levels=(0,),
            heads=2, context_dim=16, checkpointing=checkpointing,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(x, t, self.text(tokens))


def made(checkpointing: Checkpointing) -> Joint:
    torch.manual_seed(0)
    network = Joint(checkpointing)
    with torch.no_grad():
        for parameter in network.parameters():  # nothing may stay zero
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return network


INPUTS = (
    torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8),
    torch.tensor([3, 500]),
    torch.arange(10).view(2, 5),
)


def step(network: nn.Module) -> dict[str, Tensor]:
    """The output and the gradient of every parameter."""
    output = network(*INPUTS)
    output.square().mean().backward()
    return {"output": output.detach()} | {
        n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None
    }


# aot_eager runs all of torch.compile but the code generator, which takes a minute.
@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_compiled_blocks_give_the_outputs_and_gradients_of_written_ones(checkpointing: Checkpointing) -> None:
    written, compiled = made(checkpointing), made(checkpointing)
    names = list(compiled.state_dict())
    assert compile_blocks(compiled, CPU, backend="aot_eager") == 2 + 8 + 4  # text, residual, attention
    assert list(compiled.state_dict()) == names
    torch._dynamo.reset()
    expected, found = step(written), step(compiled)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0 and not torch._dynamo.utils.counters["graph_break"]
    assert found.keys() == expected.keys()
    # Of the largest gradient: that of a bias before a norm of its channel alone is nothing but rounding.
    largest = max(float(value.abs().max()) for name, value in expected.items() if name != "output")
    for name, value in expected.items():
        scale = float(value.abs().max()) if name == "output" else largest
        assert float((found[name] - value).abs().max()) <= 1e-5 * scale, name
    with torch.no_grad():  # another batch, and nothing is compiled for it
        compiled(*(part[:1] for part in INPUTS))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="code is generated for a C++ compiler, and there is no g++"
)
def test_generated_code_of_a_block_computes_the_same() -> None:
    torch.manual_seed(0)
    written, compiled = (ResnetBlock(32, 32, eps=1e-5, time_channels=8) for _ in range(2))
    compiled.load_state_dict(written.state_dict())
    assert compile_blocks(compiled, CPU) == 1
    x, time = torch.randn(2, 32, 8, 8), torch.randn(2, 8)
    torch.testing.assert_close(compiled(x, time), written(x, time), rtol=0, atol=2e-5)
    for block in (written, compiled):
        block(x, time).square().mean().backward()
    for expected, found in zip(written.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=2e-5)


def test_a_missing_compiler_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/c++",))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler .* or give train.compile=off"):
        compile_blocks(nn.Identity(), CPU)
