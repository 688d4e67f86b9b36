"""The first stage: images to latents and back, with a KL-regularised or a vector-quantised bottleneck.

Rombach et al. 2022, section 3.1 and appendix G (the released sizes are in conf/autoencoder/). Every level but
the last halves height and width, so f = 2^(levels - 1). Module names follow diffusers where it has such a
module; up_blocks run in order, lowest resolution first. `forward` does encode, sample and decode in one call,
which a ZeRO engine needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ldmscale.models.bottleneck import Codes, Posterior, VectorQuantizer
from ldmscale.models.layers import (
    NORM_GROUPS,
    Checkpointing,
    Downsample,
    NormSiLU,
    ResnetBlock,
    Upsample,
    check_checkpointing,
    run_block,
)
from ldmscale.models.transformer import SpatialAttention

EPS = 1e-6


class Blocks(nn.Module):
    """Residual blocks of one resolution, the first `attention_after` with attention; then resampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        count: int,
        attention_after: int,
        resample: nn.Module | None,
        dropout: float,
        norm_groups: int,
        checkpointing: Checkpointing,
    ) -> None:
        super().__init__()
        self.checkpointing: Checkpointing = checkpointing
        self.resnets = nn.ModuleList(
            ResnetBlock(
                in_channels if i == 0 else out_channels,
                out_channels,
                eps=EPS,
                norm_groups=norm_groups,
                dropout=dropout,
            )
            for i in range(count)
        )
        self.attentions = nn.ModuleList(
            SpatialAttention(out_channels, heads=1, eps=EPS, norm_groups=norm_groups)
            for _ in range(attention_after)
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']."""
        for index, resnet in enumerate(self.resnets):
            x = run_block(resnet, self.checkpointing, x)  # [B, out, H, W]
            if index < len(self.attentions):
                x = run_block(self.attentions[index], self.checkpointing, x)
        return x if self.resample is None else run_block(self.resample, self.checkpointing, x)


class Encoder(nn.Module):
    """Images [B, image_channels, H, W] to features [B, out_channels, H/f, W/f]."""

    def __init__(
        self,
        *,
        image_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[float],
        blocks_per_level: int,
        attention_levels: Sequence[int],
        mid_attention: bool,
        dropout: float,
        norm_groups: int,
        checkpointing: Checkpointing,
    ) -> None:
        super().__init__()
        sizes = [round(channels * m) for m in channel_mult]
        self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        current = channels
        for level, size in enumerate(sizes):
            last = level == len(sizes) - 1
            self.down_blocks.append(
                Blocks(
                    current,
                    size,
                    count=blocks_per_level,
                    attention_after=blocks_per_level if level in attention_levels else 0,
                    resample=None if last else Downsample(size, one_sided=True),
                    dropout=dropout,
                    norm_groups=norm_groups,
                    checkpointing=checkpointing,
                )
            )
            current = size
        self.mid_block = Blocks(
            current,
            current,
            count=2,
            attention_after=int(mid_attention),
            resample=None,
            dropout=dropout,
            norm_groups=norm_groups,
            checkpointing=checkpointing,
        )
        self.conv_norm_out = NormSiLU(current, eps=EPS, groups=norm_groups)
        self.conv_out = nn.Conv2d(current, out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        step = 2 ** (len(self.down_blocks) - 1)
        if images.shape[2] % step or images.shape[3] % step:
            raise ValueError(
                f"the images are {images.shape[2]}x{images.shape[3]}: "
                f"height and width must be multiples of {step}"
            )
        x = self.conv_in(images)  # [B, channels, H, W]
        for block in self.down_blocks:
            x = block(x)  # [B, size, H_l, W_l]
        x = self.mid_block(x)  # [B, size, h, w]
        result: Tensor = self.conv_out(self.conv_norm_out(x))  # [B, out, h, w]
        return result


class Decoder(nn.Module):
    """Latents [B, latent_channels, h, w] to images [B, image_channels, f h, f w]."""

    def __init__(
        self,
        *,
        image_channels: int,
        latent_channels: int,
        channels: int,
        channel_mult: Sequence[float],
        blocks_per_level: int,
        attention_levels: Sequence[int],
        mid_attention: bool,
        dropout: float,
        norm_groups: int,
        checkpointing: Checkpointing,
    ) -> None:
        super().__init__()
        sizes = [round(channels * m) for m in channel_mult]
        current = sizes[-1]
        self.conv_in = nn.Conv2d(latent_channels, current, 3, padding=1)
        self.mid_block = Blocks(
            current,
            current,
            count=2,
            attention_after=int(mid_attention),
            resample=None,
            dropout=dropout,
            norm_groups=norm_groups,
            checkpointing=checkpointing,
        )
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(sizes))):
            size = sizes[level]
            self.up_blocks.append(
                Blocks(
                    current,
                    size,
                    count=blocks_per_level + 1,
                    attention_after=blocks_per_level + 1 if level in attention_levels else 0,
                    resample=Upsample(size) if level > 0 else None,
                    dropout=dropout,
                    norm_groups=norm_groups,
                    checkpointing=checkpointing,
                )
            )
            current = size
        self.conv_norm_out = NormSiLU(current, eps=EPS, groups=norm_groups)
        self.conv_out = nn.Conv2d(current, image_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.conv_in(latent)  # [B, size, h, w]
        x = self.mid_block(x)  # [B, size, h, w]
        for block in self.up_blocks:
            x = block(x)  # [B, size, H_l, W_l]
        result: Tensor = self.conv_out(self.conv_norm_out(x))  # [B, image_channels, H, W]
        return result


class KLAutoencoder(nn.Module):
    """Autoencoder whose latent is a diagonal Gaussian, held near the standard normal by a small KL weight.

    Args:
        image_channels, latent_channels: channels of images and of one latent sample.
        channels, channel_mult, blocks_per_level: width of level 0, one factor a level, residual blocks a
            level.
        attention_levels: levels (0 = image resolution) with attention after every residual block.
        mid_attention: attention at the lowest resolution.
        norm_groups: of every normalisation; 32 in the published models.
        checkpointing: "full" keeps only the inputs of the blocks for the backward pass,
            "selective" the results of attention too.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        latent_channels: int,
        channels: int,
        channel_mult: Sequence[float],
        blocks_per_level: int,
        attention_levels: Sequence[int] = (),
        mid_attention: bool = True,
        dropout: float = 0.0,
        norm_groups: int = NORM_GROUPS,
        checkpointing: Checkpointing = "off",
    ) -> None:
        super().__init__()
        _check(checkpointing, attention_levels, channel_mult)
        self.downsampling = 2 ** (len(channel_mult) - 1)
        self.latent_channels = latent_channels
        self.encoder = Encoder(
            image_channels=image_channels,
            out_channels=2 * latent_channels,
            channels=channels,
            channel_mult=channel_mult,
            blocks_per_level=blocks_per_level,
            attention_levels=attention_levels,
            mid_attention=mid_attention,
            dropout=dropout,
            norm_groups=norm_groups,
            checkpointing=checkpointing,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(
            image_channels=image_channels,
            latent_channels=latent_channels,
            channels=channels,
            channel_mult=channel_mult,
            blocks_per_level=blocks_per_level,
            attention_levels=attention_levels,
            mid_attention=mid_attention,
            dropout=dropout,
            norm_groups=norm_groups,
            checkpointing=checkpointing,
        )

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer whose weight gradient balances the adversarial loss."""
        return self.decoder.conv_out

    def encode(self, images: Tensor) -> Posterior:
        """images [B, 3, H, W] in [-1, 1] -> posterior over [B, C, H/f, W/f]."""
        return Posterior.from_moments(self.quant_conv(self.encoder(images)))

    def decode(self, latent: Tensor) -> Tensor:
        """latent [B, C, h, w] -> images [B, 3, f h, f w], about in [-1, 1], not clamped."""
        result: Tensor = self.decoder(self.post_quant_conv(latent))
        return result

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Posterior]:
        """(reconstruction of a posterior sample, posterior). noise [B, C, h, w]; None takes the mean."""
        posterior = self.encode(images)
        latent = posterior.mode() if noise is None else posterior.sample(noise)  # [B, C, h, w]
        return self.decode(latent), posterior


class VQAutoencoder(nn.Module):
    """Autoencoder whose latent is replaced by vectors of a learned table.

    As in the released models, `encode` gives the latent *before* quantisation (that is what diffusion learns)
    and `decode` quantises first. Arguments as in KLAutoencoder, and:
        codebook_size: rows of the table.
        codebook_dim: width of a row; None for latent_channels.
        commitment: weight of the term that moves the rows (see VectorQuantizer).
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        latent_channels: int,
        channels: int,
        channel_mult: Sequence[float],
        blocks_per_level: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        commitment: float = 0.25,
        attention_levels: Sequence[int] = (),
        mid_attention: bool = True,
        dropout: float = 0.0,
        norm_groups: int = NORM_GROUPS,
        checkpointing: Checkpointing = "off",
    ) -> None:
        super().__init__()
        _check(checkpointing, attention_levels, channel_mult)
        codebook_dim = latent_channels if codebook_dim is None else codebook_dim
        self.downsampling = 2 ** (len(channel_mult) - 1)
        self.latent_channels = codebook_dim
        self.encoder = Encoder(
            image_channels=image_channels,
            out_channels=latent_channels,
            channels=channels,
            channel_mult=channel_mult,
            blocks_per_level=blocks_per_level,
            attention_levels=attention_levels,
            mid_attention=mid_attention,
            dropout=dropout,
            norm_groups=norm_groups,
            checkpointing=checkpointing,
        )
        self.quant_conv = nn.Conv2d(latent_channels, codebook_dim, 1)
        self.quantize = VectorQuantizer(codebook_size, codebook_dim, commitment=commitment)
        self.post_quant_conv = nn.Conv2d(codebook_dim, latent_channels, 1)
        self.decoder = Decoder(
            image_channels=image_channels,
            latent_channels=latent_channels,
            channels=channels,
            channel_mult=channel_mult,
            blocks_per_level=blocks_per_level,
            attention_levels=attention_levels,
            mid_attention=mid_attention,
            dropout=dropout,
            norm_groups=norm_groups,
            checkpointing=checkpointing,
        )

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer whose weight gradient balances the adversarial loss."""
        return self.decoder.conv_out

    def encode(self, images: Tensor) -> Codes:
        """images [B, 3, H, W] in [-1, 1] -> codes over [B, C, H/f, W/f]."""
        codes: Codes = self.quantize(self.quant_conv(self.encoder(images)))
        return codes

    def decode(self, latent: Tensor, *, quantize: bool = True) -> Tensor:
        """latent [B, C, h, w] -> images [B, 3, f h, f w]; quantises first unless the latent already is."""
        if quantize:
            latent = self.quantize(latent).quantized  # [B, C, h, w]
        result: Tensor = self.decoder(self.post_quant_conv(latent))
        return result

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Codes]:
        """(reconstruction, codes). `noise` is ignored: it lets both kinds of autoencoder be called alike."""
        codes = self.encode(images)
        return self.decode(codes.quantized, quantize=False), codes


def _check(checkpointing: str, attention_levels: Sequence[int], channel_mult: Sequence[float]) -> None:
    check_checkpointing(checkpointing)
    wrong = sorted(level for level in attention_levels if not 0 <= level < len(channel_mult))
    if wrong:
        raise ValueError(
            f"attention_levels names {wrong}, but channel_mult makes levels 0 to {len(channel_mult) - 1} "
            "(0 = image resolution)"
        )
