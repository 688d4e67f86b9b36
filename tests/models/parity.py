"""Compares a network of ours with diffusers' on the same random weights: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers_keys import key_of, ours_from
from torch import Tensor, nn

# Shares of the reference's largest value. A GroupNorm epsilon of 1e-5 in place of 1e-6 already makes 1e-5.
LIMITS = {torch.float32: 5e-6, torch.float64: 1e-10}


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Every parameter random: norms and biases away from one and zero, matrices with outputs of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.dim() > 1:
                draw = draw / p[0].numel() ** 0.5
            elif name.endswith("weight"):
                draw = 1 + 0.2 * draw
            else:
                draw = 0.2 * draw
            p.copy_(draw)


def assert_parity(
    ours: nn.Module,
    reference: nn.Module,
    call_ours: Callable[..., Tensor | tuple[Tensor, ...]],
    call_reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: list[Tensor],
    dtype: torch.dtype,
    *,
    text: bool = False,
) -> None:
    """Raises unless both networks, given the same weights, agree within LIMITS[dtype].

    `call_*` take the network's differentiable `inputs`, hold everything else, and give its outputs.
    """
    randomise(reference)
    reference.to(dtype).eval()
    ours.to(dtype).eval()
    names = [name for name, _ in ours.named_parameters()]
    ours.load_state_dict(ours_from(dict(reference.named_parameters()), names, text=text), strict=False)

    found, found_inputs = _run(call_ours, inputs, dtype)
    expected, expected_inputs = _run(call_reference, inputs, dtype)
    limit = LIMITS[dtype]
    for index, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.shape == e.shape
        assert _distance(f, e) <= limit, f"output {index} differs by {_distance(f, e):.1e}"
    noise = _own_rounding(reference, call_reference, inputs, expected_inputs, dtype)
    for index, (f, e, n) in enumerate(zip(found_inputs, expected_inputs, noise, strict=True)):
        assert _distance(f, e) <= max(limit, 3 * n), (
            f"gradients of input {index} differ by {_distance(f, e):.1e}"
        )

    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    largest = max(float(g.norm()) for g in gradients.values())
    # In fp32 a small gradient carries the rounding of the large terms that cancelled in it, so errors are
    # shares of the largest gradient. In fp64 they are shares of its own (some are zero: the bias of keys).
    floor = largest if dtype == torch.float32 else 1e-3 * largest
    for name, p in ours.named_parameters():
        assert p.grad is not None, f"{name} got no gradient"
        e = gradients[key_of(name, text=text)].reshape(p.shape)
        error = float((p.grad - e).norm()) / max(float(e.norm()), floor)
        assert error <= limit, f"gradient of {name} differs by {error:.1e}"


def _run(
    call: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.to(dtype).detach().clone().requires_grad_(True) for x in inputs]
    result = call(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outputs]
    torch.autograd.backward(outputs, upstream)
    gradients = []
    for leaf in leaves:
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    return [o.detach() for o in outputs], gradients


def _own_rounding(
    reference: nn.Module,
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: list[Tensor],
    gradients: list[Tensor],
    dtype: torch.dtype,
) -> list[float]:
    """How far the reference's input gradients are from its own in fp64: up to 8e-6 in fp32 (VQ f16)."""
    if dtype == torch.float64:
        return [0.0] * len(gradients)
    kept = {name: p.grad for name, p in reference.named_parameters()}
    reference.zero_grad(set_to_none=True)
    reference.double()
    _, exact = _run(call, [x.to(dtype) for x in inputs], torch.float64)
    reference.to(dtype)
    for name, p in reference.named_parameters():
        p.grad = kept[name]
    return [_distance(g, e) for g, e in zip(gradients, exact, strict=True)]


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
