"""The first stage in tiles: as whole, without seams, in the memory of a tile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder
from ldmscale.models.tiling import decode_in_tiles, encode_in_tiles

STEP = 2 / 255  # between two values of a pixel


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unlike_itself(*shape: int) -> Tensor:
    """Noise of another spread above than below, and of another mean at the right: tiles have statistics of their own."""
    x = drawn(*shape)
    x[:, :, : shape[2] // 2] *= 0.2
    x[:, :, :, shape[3] // 2 :] += 1.5
    return x


def random_autoencoder(kind: str, attention_levels: tuple[int, ...]) -> KLAutoencoder | VQAutoencoder:
    torch.manual_seed(0)
    sizes = {"channels": 8, "channel_mult": (1, 2, 2), "blocks_per_level": 1, "norm_groups": 4}
    levels = {"latent_channels": 4, "attention_levels": attention_levels}
    if kind == "kl":
        network: KLAutoencoder | VQAutoencoder = KLAutoencoder(**sizes, **levels)
    else:
        network = VQAutoencoder(codebook_size=64, **sizes, **levels)
    for name, weight in network.named_parameters():
        if weight.dim() == 1:
            nn.init.normal_(weight, float("norm" in name and "weight" in name), 0.3)
    return network.double().eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("attention_levels", [(), (2,)])
def test_with_all_passes_tiles_are_exact(kind: str, attention_levels: tuple[int, ...]) -> None:
    network = random_autoencoder(kind, attention_levels)
    latent = unlike_itself(2, 4, 19, 26)
    images = unlike_itself(1, 3, 76, 104)
    decoded, moments = network.decode(latent), network.encode(images).moments()
    for tile_pixels in (28, 52):
        found = decode_in_tiles(network, latent, tile_pixels, tolerance=0.0)
        torch.testing.assert_close(found, decoded, rtol=0, atol=1e-11)
        found = encode_in_tiles(network, images, tile_pixels, tolerance=0.0)
        torch.testing.assert_close(found, moments, rtol=0, atol=1e-11)


def test_a_sample_is_decoded_alike_whatever_the_others_are() -> None:
    network = random_autoencoder("kl", ())
    latents = torch.cat([unlike_itself(1, 4, 16, 16), drawn(1, 4, 16, 16, seed=1)])
    apart = torch.cat([decode_in_tiles(network, one, 24) for one in latents.split(1)])
    assert torch.equal(decode_in_tiles(network, latents, 24), apart)


@pytest.fixture(scope="module")
def trained() -> KLAutoencoder:
    """A KL-f2 autoencoder after 180 steps on pictures of flat areas, edges and texture."""
    torch.manual_seed(0)
    network = KLAutoencoder(
        latent_channels=4, channels=16, channel_mult=(1, 2), blocks_per_level=1, norm_groups=4
    )
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(180):
        images = pictures(4, 32, step)
        found, _ = network(images)
        loss = F.l1_loss(found, images)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.2, loss.item()
    return network.double().eval().requires_grad_(False)


def pictures(count: int, side: int, seed: int) -> Tensor:
    """[count, 3, side, side] in [-1, 1]: a tint that changes slowly, a bright box, and texture in one corner."""
    generator = torch.Generator().manual_seed(seed)
    tint = F.interpolate(torch.rand(count, 3, 3, 3, generator=generator), size=(side, side), mode="bilinear")
    box = torch.zeros(count, 1, side, side)
    for i, (row, column) in enumerate(torch.randint(0, side // 2, (count, 2), generator=generator).tolist()):
        box[i, :, row : row + side // 3, column : column + side // 3] = 0.7
    texture = torch.rand(count, 1, side, side, generator=generator) * 0.2
    texture[:, :, : side // 2] = 0
    return ((tint * 0.6 + box + texture).clamp(0, 1) * 2 - 1).float()


def apart(network: KLAutoencoder, latent: Tensor, tile: int, halo: int) -> Tensor:
    """The plain way: each tile of the latent decoded by itself, with as much around it, and cut."""
    rows = []
    for top in range(0, latent.shape[2], tile):
        row = []
        for left in range(0, latent.shape[3], tile):
            low, side = max(0, top - halo), max(0, left - halo)
            part = network.decode(latent[:, :, low : top + tile + halo, side : left + tile + halo])
            y, x = (top - low) * 2, (left - side) * 2
            row.append(part[:, :, y : y + tile * 2, x : x + tile * 2])
        rows.append(torch.cat(row, dim=3))
    return torch.cat(rows, dim=2)


def seams(found: Tensor, whole: Tensor, every: int) -> float:
    """The mean step from pixel to pixel across the borders of tiles, over what it is there without tiles."""
    ratios = []
    for axis in (2, 3):
        steps = [
            image.diff(dim=axis).abs().mean(dim=[i for i in range(4) if i != axis])
            for image in (found, whole)
        ]
        at_borders = torch.arange(1, len(steps[0]) + 1) % every == 0
        ratios.append(float(steps[0][at_borders].mean() / steps[1][at_borders].mean()))
    return max(ratios)


def test_a_trained_decoder_leaves_no_seams_and_stays_within_a_tenth_of_a_pixels_step(
    trained: KLAutoencoder,
) -> None:
    images = pictures(1, 128, 1000).double()
    latent = trained.encode(images).mean
    whole = trained.decode(latent)
    found = decode_in_tiles(trained, latent, 32)
    assert float((found - whole).abs().max()) < STEP / 10
    assert seams(found, whole, 32) < 1.001
    moments = encode_in_tiles(trained, images, 32)[:, :4]
    assert float((moments - latent).abs().max() / latent.std()) < 0.01
    # What this is measured against: tiles that are normalised each by itself, with the same surroundings.
    plain = apart(trained, latent, 16, 9)
    assert seams(plain, whole, 32) > 2 and float((plain - whole).abs().max()) > 10 * STEP


def peak_bytes(work: Callable[[], Tensor]) -> int:
    """The most that was allocated at once while `work` ran, as PyTorch's allocator reports it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    results = found.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def test_memory_is_that_of_a_tile_and_not_of_the_image() -> None:
    torch.manual_seed(0)
    network = KLAutoencoder(
        latent_channels=4,
        channels=16,
        channel_mult=(1, 1, 1),
        blocks_per_level=1,
        norm_groups=4,
        mid_attention=False,
    )
    network.eval().requires_grad_(False)
    latents = {side: drawn(1, 4, side // 4, side // 4).float() for side in (192, 384)}
    whole = {side: peak_bytes(lambda z=z: network.decode(z)) for side, z in latents.items()}
    tiled = {
        side: peak_bytes(lambda z=z: decode_in_tiles(network, z, 32, 9.0)) for side, z in latents.items()
    }
    assert whole[384] > 3.5 * whole[192]
    assert tiled[384] < whole[384] / 4, (whole, tiled)
    # What still grows is the image itself, and the maps at the latent's resolution.
    assert tiled[384] < 1.5 * tiled[192], (whole, tiled)
    images = pictures(1, 384, 0)
    at_once = peak_bytes(lambda: network.encode(images).moments())
    assert peak_bytes(lambda: encode_in_tiles(network, images, 32, 9.0)) < at_once / 4


def test_images_no_larger_than_a_tile_are_not_cut(trained: KLAutoencoder) -> None:
    latent = drawn(2, 4, 24, 24)
    assert torch.equal(
        decode_in_tiles(trained, latent, 48), torch.cat([trained.decode(one) for one in latent.split(1)])
    )
