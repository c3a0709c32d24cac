"""The diffusion schedule and learned variance against ``diffusers``' DDPMScheduler (squaredcos_cap_v2, learned_range)."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from utgrec.tokenizer.diffusion import CosineSchedule

STEPS = 1000


@pytest.fixture
def theirs() -> DDPMScheduler:
    scheduler = DDPMScheduler(
        STEPS, beta_schedule="squaredcos_cap_v2", variance_type="learned_range", prediction_type="epsilon", clip_sample=False
    )
    scheduler.set_timesteps(STEPS)
    return scheduler


def constants(t_M: torch.Tensor):  # type: ignore[no-untyped-def]
    return CosineSchedule(STEPS).at(t_M, torch.float64)


def test_betas_and_their_products(theirs: DDPMScheduler) -> None:
    at = constants(torch.arange(STEPS))
    torch.testing.assert_close(at.log_large[:, 0].exp(), theirs.betas.double(), rtol=1e-5, atol=1e-7)
    # theirs multiplies in fp32 and takes 1 - abar of it: in the last steps little of abar is left
    torch.testing.assert_close(at.signal[:, 0].square(), theirs.alphas_cumprod.double(), rtol=1e-3, atol=1e-6)


def test_noised_latents(theirs: DDPMScheduler) -> None:
    torch.manual_seed(0)
    x_MC, noise_MC, t_M = torch.randn(STEPS, 16), torch.randn(STEPS, 16), torch.arange(STEPS)
    at = constants(t_M)
    ours_MC = (at.signal * x_MC + at.noise * noise_MC).float()
    torch.testing.assert_close(ours_MC, theirs.add_noise(x_MC, noise_MC, t_M), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("t", [1, 2, 10, 300, 700, 990, 999])
def test_mean_and_learned_variance_of_a_step_back(theirs: DDPMScheduler, t: int) -> None:
    """Their step with noise of ours: (step - mean) / noise is its standard deviation."""
    torch.manual_seed(1)
    noised_MC, guess_MC, v_MC = torch.randn(8, 16), torch.randn(8, 16), torch.rand(8, 16) * 2 - 1
    at = constants(torch.full((8,), t))
    share_MC = (v_MC + 1) / 2
    log_variance_MC = share_MC * at.log_large + (1 - share_MC) * at.log_small
    found = theirs._get_variance(t, predicted_variance=v_MC, variance_type="learned_range")
    torch.testing.assert_close(found.double(), log_variance_MC, rtol=1e-3, atol=2e-3)
    start_MC = (noised_MC - at.noise * guess_MC) / at.signal
    mean_MC = at.from_start * start_MC + at.from_here * noised_MC
    generator = torch.Generator().manual_seed(9)
    stepped = theirs.step(torch.cat([guess_MC, v_MC], 1), t, noised_MC, generator=generator)
    noise_MC = torch.randn(8, 16, generator=torch.Generator().manual_seed(9))
    expected = mean_MC + torch.exp(log_variance_MC / 2) * noise_MC
    torch.testing.assert_close(stepped.prev_sample.double(), expected, rtol=2e-3, atol=2e-3)
