"""What is measured: a network with its loss, and one step of its training, for each implementation.

Every contender has the same weights (names.py), inputs and hyper-parameters. `backward` is forward and backward
alone; `step` is the whole training step with clipping, AdamW and average, as the implementation's users run it:

- ours: `ldmscale.train.engine.engine.Engine` and `ShardedEma`, as the trainer calls them;
- diffusers: its networks, `clip_grad_norm_`, AdamW, `EMAModel`; "fused" takes `AdamW(fused=True)` and
  `EMAModel(foreach=True)`, "default" the defaults of both;
- compvis: the networks of compvis.py, the default AdamW, an average updated tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import compvis
from benchmarks.names import draw_weights

RATE, BETAS, DECAY, CLIP = 1e-5, (0.9, 0.999), 0.9999, 1.0
KL_WEIGHT = 1e-6


@dataclass(frozen=True)
class Contender:
    """One implementation in one configuration."""

    who: Literal["ours", "diffusers", "compvis"]
    family: Literal["unet", "autoencoder", "text"]
    what: Literal["backward", "step"]
    heads: int = 8
    checkpointing: str = "off"
    zero: int = 0  # ours, step
    stack: Literal["fused", "default"] = "fused"  # diffusers, step
    channels_last: bool = False  # diffusers, autoencoder
    quick: bool = False  # a network for a test of the benchmark itself

    @property
    def name(self) -> str:
        parts = [self.who]
        if self.what == "step" and self.who == "ours":
            parts.append(f"ZeRO-{self.zero}")
        if self.what == "step" and self.who == "diffusers":
            parts.append(self.stack)
        if self.channels_last:
            parts.append("channels_last")
        if self.checkpointing != "off":
            parts.append(f"checkpointing {self.checkpointing}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Sizes:
    channels: int = 64
    mult: tuple[int, ...] = (1, 2, 4, 4)
    attention: tuple[int, ...] = (0, 1, 2)
    context: int = 256
    tokens: int = 77
    batch: int = 4
    latent: int = 32
    pixels: int = 64
    text_layers: int = 8
    vocabulary: int = 8192


QUICK = Sizes(
    channels=32,
    mult=(1, 2),
    attention=(0,),
    context=32,
    tokens=5,
    batch=2,
    latent=8,
    pixels=16,
    text_layers=2,
    vocabulary=64,
)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Joint(nn.Module):
    """U-Net and text transformer, trained together."""

    def __init__(self, text: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.text, self.unet = text, unet

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        context = self.text(tokens)
        prediction = self.unet(x, t, context if isinstance(context, Tensor) else context[0])
        return prediction if isinstance(prediction, Tensor) else prediction.sample


Call = Callable[..., Any]


class Task:
    """A network with its weights, and the loss of its one batch."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.sizes = QUICK if contender.quick else Sizes()
        self.network = _network(contender, self.sizes)
        draw_weights(self.network)
        s = self.sizes
        if contender.family == "autoencoder":
            f = 2 ** (len(s.mult) - 1)
            images = draw(s.batch, 3, s.pixels, s.pixels, seed=1).tanh()
            if contender.who == "ours" or contender.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)  # as the stage does
            self.inputs = (images, draw(s.batch, 4, s.pixels // f, s.pixels // f, seed=2))
        else:
            x = draw(s.batch, 4, s.latent, s.latent, seed=1)
            t = torch.linspace(3, 981, s.batch).long()
            if contender.family == "text":
                tokens = torch.arange(s.batch * s.tokens).view(s.batch, -1) * 37 % s.vocabulary
                self.inputs = (x, t, tokens)
            else:
                self.inputs = (x, t, draw(s.batch, s.tokens, s.context, seed=2))
            self.target = draw(s.batch, 4, s.latent, s.latent, seed=3)

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """(loss, output)."""
        if self.contender.family != "autoencoder":
            output = call(*self.inputs)
            output = output if isinstance(output, Tensor) else output.sample
            return F.mse_loss(output, self.target), output
        images, noise = self.inputs
        if self.contender.who == "diffusers":
            posterior = self.network.encode(images).latent_dist
            output = self.network.decode(posterior.mean + posterior.std * noise).sample
            kl = posterior.kl()
        else:
            output, posterior = call(images, noise)
            kl = posterior if isinstance(posterior, Tensor) else posterior.kl()
        return (output - images).abs().mean() + KL_WEIGHT * kl.mean(), output


def stepper(contender: Contender, task: Task) -> Callable[[], float]:
    """A function that does the contender's work once and returns the loss."""
    if contender.what == "backward":
        return _backward(task)
    return _our_step(contender, task) if contender.who == "ours" else _their_step(contender, task)


def _backward(task: Task) -> Callable[[], float]:
    def run() -> float:
        task.network.zero_grad(set_to_none=True)
        loss, _ = task.forward(task.network)
        loss.backward()
        return loss.item()

    return run


def _our_step(contender: Contender, task: Task) -> Callable[[], float]:
    from ldmscale.train.engine.ema import ShardedEma
    from ldmscale.train.engine.engine import Engine
    from ldmscale.train.engine.options import EngineOptions

    options = EngineOptions(
        zero_stage=contender.zero,
        precision="fp32",
        rank_micro_batch=task.sizes.batch,
        gradient_clip_norm=None if contender.family == "autoencoder" else CLIP,
        learning_rate=RATE,
        betas=BETAS,
    )
    if contender.zero == 3:
        task.network = _built_in_shards(contender, task, options)
    engine = Engine("network", task.network, options, torch.device("cpu"))
    average = None if contender.family == "autoencoder" else ShardedEma(engine.masters, DECAY)

    def run() -> float:
        loss, _ = task.forward(engine)
        engine.backward(loss)
        if engine.step() and average is not None:
            average.update()
        engine.gradient_norm()
        return loss.item()

    return run


def _built_in_shards(contender: Contender, task: Task, options: Any) -> nn.Module:
    """The network as a run at ZeRO-3 builds it; its weights come from the one that was built whole."""
    import deepspeed

    from ldmscale.train.engine.engine import sharded_construction

    with sharded_construction(options):
        network = _network(contender, task.sizes)
    whole = dict(task.network.named_parameters())
    for name, parameter in network.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
            parameter.copy_(whole[name])
    return network


def _their_step(contender: Contender, task: Task) -> Callable[[], float]:
    from diffusers.training_utils import EMAModel

    gan = contender.family == "autoencoder"
    trained = [p for name, p in task.network.named_parameters() if "to_logits" not in name]
    fused = contender.who == "diffusers" and contender.stack == "fused"
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=BETAS, fused=True if fused else None)
    average: Any = None
    shadow: list[Tensor] = []
    if contender.who == "diffusers" and not gan:
        average = EMAModel(trained, decay=DECAY, use_ema_warmup=False, foreach=fused)
    elif not gan:
        shadow = [p.detach().clone() for p in trained]

    def run() -> float:
        loss, _ = task.forward(task.network)
        loss.backward()
        if not gan:
            nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.step(trained)
        with torch.no_grad():
            for kept, parameter in zip(shadow, trained if shadow else (), strict=True):
                kept.sub_((1 - DECAY) * (kept - parameter))
        return loss.item()

    return run


def _network(contender: Contender, s: Sizes) -> nn.Module:
    if contender.family == "autoencoder":
        return _autoencoder(contender, s)
    unet = _unet(contender, s)
    return unet if contender.family == "unet" else Joint(_text(contender, s), unet)


def _unet(contender: Contender, s: Sizes) -> nn.Module:
    checkpointed = contender.checkpointing != "off"
    if contender.who == "compvis":
        return compvis.UNet(s.channels, s.mult, s.attention, contender.heads, s.context, checkpointed)
    if contender.who == "ours":
        from ldmscale.models.unet import UNet

        return UNet(
            in_channels=4,
            out_channels=4,
            channels=s.channels,
            channel_mult=s.mult,
            blocks_per_level=2,
            attention_levels=s.attention,
            heads=contender.heads,
            context_dim=s.context,
            checkpointing=contender.checkpointing,  # type: ignore[arg-type]
        )
    from diffusers import UNet2DConditionModel

    levels = range(len(s.mult))
    unet = UNet2DConditionModel(
        sample_size=s.latent,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=tuple(s.channels * m for m in s.mult),
        down_block_types=tuple("CrossAttnDownBlock2D" if i in s.attention else "DownBlock2D" for i in levels),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if i in s.attention else "UpBlock2D" for i in reversed(levels)
        ),
        attention_head_dim=contender.heads,  # the number of heads, in this class
        cross_attention_dim=s.context,
    )
    if checkpointed:
        unet.enable_gradient_checkpointing()
    return unet


def _text(contender: Contender, s: Sizes) -> nn.Module:
    width, heads, size = s.context, 4, s.context // 4
    if contender.who == "ours":
        from ldmscale.models.text_encoder import TextTransformer

        return TextTransformer(
            vocab_size=s.vocabulary,
            max_tokens=s.tokens,
            width=width,
            layers=s.text_layers,
            heads=heads,
            head_channels=size,
        )
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    return LDMBertModel(
        LDMBertConfig(
            vocab_size=s.vocabulary,
            max_position_embeddings=s.tokens,
            encoder_layers=s.text_layers,
            d_model=width,
            encoder_ffn_dim=4 * width,
            encoder_attention_heads=heads,
            head_dim=size,
            dropout=0.0,
        )
    )


def _autoencoder(contender: Contender, s: Sizes) -> nn.Module:
    if contender.who == "compvis":
        return compvis.Autoencoder(4, s.channels, s.mult)
    if contender.who == "ours":
        from ldmscale.models.autoencoder import KLAutoencoder

        return KLAutoencoder(latent_channels=4, channels=s.channels, channel_mult=s.mult, blocks_per_level=2)
    from diffusers import AutoencoderKL

    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(s.mult),
        up_block_types=("UpDecoderBlock2D",) * len(s.mult),
        block_out_channels=tuple(s.channels * m for m in s.mult),
        latent_channels=4,
        layers_per_block=2,
        sample_size=s.pixels,
    )
    return network.to(memory_format=torch.channels_last) if contender.channels_last else network
