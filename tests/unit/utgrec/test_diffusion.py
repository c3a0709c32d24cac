"""The diffusion loss against formulas written down independently, in float64, latent by latent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from utgrec.tokenizer.diffusion import CosineSchedule, DiffusionLoss, bound, waves


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(21)


def abar(step: int, T: int = 1000) -> float:
    """The product of 1 - beta up to a step."""
    product = 1.0
    for i in range(step + 1):
        curve = [math.cos((s / T + 0.008) / 1.008 * math.pi / 2) ** 2 for s in (i, i + 1)]
        product *= 1 - min(1 - curve[1] / curve[0], 0.999)
    return product


def small_variance(t: int) -> float:
    before, here = abar(t - 1), abar(t)
    return (1 - here / before) * (1 - before) / (1 - here)


def plain_bound(x: float, noise: float, guess: float, v: float, t: int) -> float:
    """The bound's term of one channel, in bits, from Bayes' rule for the chain's Gaussians rather than from closed constants."""
    here, before = abar(t), abar(t - 1) if t else 1.0
    alpha = here / before
    noised = math.sqrt(here) * x + math.sqrt(1 - here) * noise
    share = (v + 1) / 2
    log_small = math.log(small_variance(max(t, 1)))
    log_variance = share * math.log(1 - alpha) + (1 - share) * log_small

    def reverse(start: float) -> float:
        """Mean of x_(t-1): prior N(sqrt(before) start, 1 - before), observed x_t = sqrt(alpha) x_(t-1) + N(0, 1 - alpha)."""
        if before == 1.0:
            return start
        precision = 1 / (1 - before) + alpha / (1 - alpha)
        return (math.sqrt(before) * start / (1 - before) + math.sqrt(alpha) * noised / (1 - alpha)) / precision

    mean = reverse((noised - math.sqrt(1 - here) * guess) / math.sqrt(here))
    if t:
        gap = (reverse(x) - mean) ** 2
        nats = 0.5 * (log_variance - log_small + (math.exp(log_small) + gap) / math.exp(log_variance) - 1)
    else:
        std = math.exp(log_variance / 2)
        lower, upper = (
            0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) for u in ((x - mean + e / 255) / std for e in (-1, 1))
        )
        share = upper if x < -0.999 else 1 - lower if x > 0.999 else upper - lower
        nats = -math.log(max(share, 1e-12))
    return nats / math.log(2)


def drawn(loss: DiffusionLoss, tokens: int, channels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Times and noise that a call after this seed uses: the documented order, times first."""
    torch.manual_seed(seed)
    t_M = torch.randint(loss.steps, (loss.repeats * tokens,))
    return t_M, torch.randn(loss.repeats * tokens, channels, dtype=torch.float64)


def awake(loss: DiffusionLoss) -> DiffusionLoss:
    """A network that is past its zero initial layers."""
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return loss.double()


def test_both_losses_equal_the_plain_formulas() -> None:
    loss = awake(DiffusionLoss(6, channels=3, width=8, depth=2, repeats=4))
    z_ND, x_NC = torch.randn(25, 6, dtype=torch.float64), torch.randn(25, 3, dtype=torch.float64)
    t_M, noise_MC = drawn(loss, 25, 3, seed=4)
    torch.manual_seed(4)
    noise_N, bound_N = loss(z_ND, x_NC)
    for n in range(25):
        squares, bits = [], []
        for m in range(n, 100, 25):  # the four copies of token n
            t = int(t_M[m])
            noised = math.sqrt(abar(t)) * x_NC[n] + math.sqrt(1 - abar(t)) * noise_MC[m]
            guess_C, v_C = loss.denoiser(noised[None], t_M[m : m + 1], z_ND[n : n + 1])[0].detach().chunk(2)
            squares += ((noise_MC[m] - guess_C) ** 2).tolist()
            bits += [plain_bound(*numbers, t) for numbers in zip(*(a.tolist() for a in (x_NC[n], noise_MC[m], guess_C, v_C)), strict=True)]
        assert noise_N[n].item() == pytest.approx(np.mean(squares), rel=1e-9)
        assert bound_N[n].item() == pytest.approx(np.mean(bits), rel=1e-7)


@pytest.mark.parametrize("t", [0, 1, 2, 500, 998, 999])
def test_the_bound_at_the_ends_of_the_chain(t: int) -> None:
    x_MC = torch.tensor([[-1.2, -0.9995, -0.3, 0.0, 0.6, 0.9995, 1.4]], dtype=torch.float64)
    noise_MC, guess_MC, v_MC = torch.randn(3, 1, 7, dtype=torch.float64)
    at = CosineSchedule(1000).at(torch.tensor([t]), torch.float64)
    found_MC = bound(x_MC, at.signal * x_MC + at.noise * noise_MC, guess_MC, v_MC, torch.tensor([t]), at)
    numbers = zip(*(a[0].tolist() for a in (x_MC, noise_MC, guess_MC, v_MC)), strict=True)
    expected_C = torch.tensor([plain_bound(*each, t) for each in numbers], dtype=torch.float64)
    torch.testing.assert_close(found_MC[0], expected_C, rtol=1e-7, atol=1e-9)


def test_the_denoiser_equals_its_formula() -> None:
    loss = awake(DiffusionLoss(6, channels=3, width=8, depth=2, steps=10, repeats=2))
    net = loss.denoiser
    x_MC, t_M, z_ND = torch.randn(12, 3).double(), torch.randint(10, (12,)), torch.randn(6, 6).double()

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)

    def linear(layer: torch.nn.Module, x: Tensor) -> Tensor:
        return layer.weight @ x + layer.bias

    for m in range(12):
        angles = [float(t_M[m]) * 10000 ** (-k / 128) for k in range(128)]
        wave = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
        y = linear(net.time[2], silu(linear(net.time[0], wave))) + linear(net.z, z_ND[m % 6])
        h = linear(net.x, x_MC[m])
        for block in net.blocks:
            shift, scale, gate = linear(block.modulation, silu(y)).split(8)
            inner = (norm(h) * block.norm.weight + block.norm.bias) * (1 + scale) + shift
            h = h + gate * linear(block.mlp[2], silu(linear(block.mlp[0], inner)))
        shift, scale = linear(net.modulation, silu(y)).split(8)
        expected = linear(net.out, norm(h) * (1 + scale) + shift)
        torch.testing.assert_close(net(x_MC, t_M, z_ND)[m], expected, rtol=1e-9, atol=1e-10)
    few = slice(0, 6)  # fewer rows than steps: times are embedded row by row
    torch.testing.assert_close(net(x_MC[few], t_M[few], z_ND), net(x_MC, t_M, z_ND)[few], rtol=1e-12, atol=1e-12)


def test_cosines_come_before_sines() -> None:
    found = waves(torch.tensor([0, 3]))
    assert torch.equal(found[0], torch.cat([torch.ones(128), torch.zeros(128)]).double())
    assert found[1, 0] == math.cos(3) and found[1, 128] == math.sin(3)
    assert found[1, 127].item() == pytest.approx(math.cos(3 * 10000 ** (-127 / 128)), rel=1e-14)


def test_the_start_values() -> None:
    """An untrained network guesses no noise: 1 for the noise, and a bound that is nearly all of t = 999's 720 bits.

    The released training's first losses, by random draws, are about 1.80, and 1.02 without the last five steps.
    """
    loss = DiffusionLoss(4, width=8, depth=1, repeats=1)
    bits_T = []
    for t in range(1000):
        x_MC, noise_MC = torch.randn(64, 16), torch.randn(64, 16)
        noise_MC = noise_MC / noise_MC.square().mean().sqrt()  # so that the mean is that of infinitely many draws but for t = 0
        t_M = torch.full((64,), t)
        at, none_MC = loss.schedule.at(t_M, torch.float32), torch.zeros_like(x_MC)
        bits_T.append(bound(x_MC, at.signal * x_MC + at.noise * noise_MC, none_MC, none_MC, t_M, at).mean().item())
    assert bits_T[999] == pytest.approx(720.6, rel=1e-3)
    assert 1 + np.mean(bits_T) == pytest.approx(1.741, abs=2e-3)
    assert 1 + np.mean(bits_T[:995]) == pytest.approx(1.02, abs=5e-3)
    noise_N, bound_N = loss(torch.randn(40_000, 4), torch.randn(40_000, 16))
    assert noise_N.mean().item() == pytest.approx(1, abs=0.01)
    assert bound_N.mean().item() == pytest.approx(np.mean(bits_T), abs=5 * 720 * (1e-3 / 40_000) ** 0.5)  # t = 999: a Poisson count


def test_initial_weights() -> None:
    net = DiffusionLoss(1536).denoiser
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(20.8e6, rel=5e-3)
    for layer in (*(block.modulation for block in net.blocks), net.modulation, net.out):
        assert not layer.weight.any() and not layer.bias.any()
    assert net.time[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert net.x.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (16 + 1024)), rel=1e-2)
    assert net.blocks[0].mlp[0].weight.std().item() == pytest.approx(math.sqrt(2 / 2048), rel=0.02)


def test_the_bound_trains_the_variance_and_nothing_else() -> None:
    loss = awake(DiffusionLoss(6, channels=3, width=8, depth=1))
    loss(torch.randn(30, 6).double(), torch.randn(30, 3).double()).bound_N.sum().backward()
    d_out = loss.denoiser.out.weight.grad
    assert not d_out[:3].any()
    assert d_out[3:].abs().min() > 0


def test_no_picture_gives_zeros_that_have_gradients() -> None:
    loss = DiffusionLoss(6, channels=3, width=8, depth=1)
    z_ND = torch.zeros(0, 6, requires_grad=True)
    noise_N, bound_N = loss(z_ND, torch.zeros(0, 3))
    total = noise_N.sum() + bound_N.sum()
    assert total.item() == 0
    total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())


@pytest.mark.parametrize("far", [1.0, 30.0])
def test_gradients_stay_finite_at_every_step(far: float) -> None:
    loss = DiffusionLoss(6, channels=3, width=8, depth=1, repeats=50)
    with torch.no_grad():
        loss.denoiser.out.weight.normal_(std=3)
    terms = loss(torch.randn(200, 6), far * torch.randn(200, 3))
    (terms.noise_N.sum() + terms.bound_N.sum()).backward()
    assert all(p.grad.isfinite().all() for p in loss.parameters())


def test_the_same_seed_gives_the_same_losses_and_a_cast_leaves_the_schedule() -> None:
    loss = DiffusionLoss(6, channels=3, width=8, depth=1)
    z_ND, x_NC = torch.randn(5, 6), torch.randn(5, 3)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(torch.stack(loss(z_ND, x_NC)))
    assert torch.equal(*found)
    torch.manual_seed(1)
    cast = torch.stack(loss.bfloat16()(z_ND.bfloat16(), x_NC))
    torch.testing.assert_close(cast, found[0], rtol=0.02, atol=0.02)
    assert loss.schedule.at(torch.tensor([3]), torch.float64).signal.item() == pytest.approx(math.sqrt(abar(3)), rel=1e-12)


def test_z_that_tells_the_latent_lowers_the_loss() -> None:
    loss = DiffusionLoss(3, channels=3, width=32, depth=1)
    optimizer = torch.optim.Adam(loss.parameters(), 3e-3)
    x_NC = torch.randn(512, 3).sign() * 0.8
    for _ in range(150):
        optimizer.zero_grad()
        loss(x_NC, x_NC).noise_N.mean().backward()
        optimizer.step()
    told, blind = loss(x_NC, x_NC).noise_N.mean(), loss(x_NC.roll(1, 0), x_NC).noise_N.mean()
    assert told < 0.5 < 0.8 * blind
