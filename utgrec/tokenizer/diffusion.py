"""The diffusion loss: how well z tells a latent token of a picture (UTGRec section 3.3; Li et al., arXiv 2406.11838, section 3.2).

In: z [N, D] from the picture decoder and the latent tokens [N, C] they stand for. Out: two losses a token, to be added:

    noise = mean over C of (e - e'(x_t, t, z))^2               x_t = sqrt(abar_t) x + sqrt(1 - abar_t) e
    bound = mean over C of the variational bound's term at t, in bits (Nichol and Dhariwal, arXiv 2102.09672, section 3.1)

Every token is noised ``repeats`` times with times and noise of its own, uniform over the steps, from torch's generator. The bound teaches
the variance only: log variance = f log beta_t + (1 - f) log posterior variance_t, f = (v + 1) / 2, and e' is detached in it.
At t = 0 its term is the likelihood of the latent, discretised into bins of 2/255. With an untrained network the noise is worth 1, and
t = T - 1 alone costs some 720 bits, with hardly a gradient: watch the two apart.

e' and v come from an MLP whose blocks are modulated by the time and z (adaptive layer norm, zero at the start).

Legend: N latent tokens, M = repeats * N, C channels, D width of z, W width of the MLP, T steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256
"""Numbers that a time becomes before the MLP: half cosines, half sines."""
EPS = 1e-6
BITS = 1 / math.log(2)


class Losses(NamedTuple):
    noise_N: Tensor
    bound_N: Tensor


class Constants(NamedTuple):
    """Numbers of a step of diffusion."""

    signal: Tensor
    """sqrt(abar): how much of the latent x_t has."""
    noise: Tensor
    """sqrt(1 - abar)."""
    from_start: Tensor
    """What x adds to the posterior mean of x_(t-1) ..."""
    from_here: Tensor
    """... and x_t."""
    log_small: Tensor
    """Log of the posterior variance; that of t = 0 would be 0, so it has that of t = 1."""
    log_large: Tensor
    """log beta."""


class CosineSchedule:
    """abar(s) = cos^2((s + 0.008) / 1.008 * pi / 2); fp64, and no part of a module, so that no cast of a model rounds it."""

    def __init__(self, steps: int):
        share = torch.arange(steps + 1, dtype=torch.float64) / steps
        curve = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
        abar = torch.cumprod(1 - beta, 0)
        before = torch.cat([abar.new_ones(1), abar[:-1]])
        posterior = beta * (1 - before) / (1 - abar)
        posterior[0] = posterior[min(1, steps - 1)]
        constants = Constants(
            signal=abar.sqrt(),
            noise=(1 - abar).sqrt(),
            from_start=beta * before.sqrt() / (1 - abar),
            from_here=(1 - before) * (1 - beta).sqrt() / (1 - abar),
            log_small=posterior.log(),
            log_large=beta.log(),
        )
        self._table = {torch.device("cpu"): torch.stack(constants, 1)}

    def at(self, t_M: Tensor, dtype: torch.dtype) -> Constants:
        """The constants of steps, [M, 1] each."""
        if t_M.device not in self._table:
            self._table[t_M.device] = self._table[torch.device("cpu")].to(t_M.device)
        return Constants(*self._table[t_M.device][t_M].to(dtype).unsqueeze(-1).unbind(1))


class DiffusionLoss(nn.Module):
    def __init__(self, width_z: int, *, channels: int = 16, width: int = 1024, depth: int = 3, steps: int = 1000, repeats: int = 4):
        super().__init__()
        self.steps, self.repeats = steps, repeats
        self.schedule = CosineSchedule(steps)
        self.denoiser = Denoiser(width_z, channels, width, depth, steps)

    def forward(self, z_ND: Tensor, target_NC: Tensor) -> Losses:
        wide = torch.promote_types(target_NC.dtype, torch.float32)
        x_MC = target_NC.to(wide).repeat(self.repeats, 1)
        t_M = torch.randint(self.steps, (len(x_MC),), device=x_MC.device)
        noise_MC = torch.randn_like(x_MC)
        at = self.schedule.at(t_M, wide)
        noised_MC = at.signal * x_MC + at.noise * noise_MC
        guess_MC, variance_MC = self.denoiser(noised_MC, t_M, z_ND).to(wide).chunk(2, -1)
        losses = ((noise_MC - guess_MC).square(), bound(x_MC, noised_MC, guess_MC.detach(), variance_MC, t_M, at))
        return Losses(*(loss.mean(-1).view(self.repeats, len(z_ND)).mean(0) for loss in losses))


def bound(x_MC: Tensor, noised_MC: Tensor, guess_MC: Tensor, variance_MC: Tensor, t_M: Tensor, at: Constants) -> Tensor:
    """The bound's term at t, in bits [M, C]: KL(q(x_(t-1) | x_t, x) | p(x_(t-1) | x_t)), at t = 0 -log p(x | x_1)."""
    share_MC = (variance_MC + 1) / 2
    log_variance_MC = share_MC * at.log_large + (1 - share_MC) * at.log_small
    mean_MC = at.from_start * (noised_MC - at.noise * guess_MC) / at.signal + at.from_here * noised_MC
    posterior_MC = at.from_start * x_MC + at.from_here * noised_MC
    apart_MC = (posterior_MC - mean_MC).square() * torch.exp(-log_variance_MC)
    kl_MC = 0.5 * (log_variance_MC - at.log_small - 1 + torch.exp(at.log_small - log_variance_MC) + apart_MC)
    # Only t = 0 is likely to be near its mean: elsewhere the bin is taken at the mean, so that nothing overflows in its gradient.
    first_M1 = (t_M == 0)[:, None]
    nll_MC = -log_bin(x_MC, torch.where(first_M1, mean_MC, x_MC), log_variance_MC / 2)
    return torch.where(first_M1, nll_MC, kl_MC) * BITS


def log_bin(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the bin of width 2/255 around x; the outermost bins, from -0.999 and 0.999 on, are open."""
    scale = torch.exp(-log_std)
    upper, lower = normal_cdf(scale * (x - mean + 1 / 255)), normal_cdf(scale * (x - mean - 1 / 255))
    share = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return share.clamp(min=1e-12).log()


def normal_cdf(x: Tensor) -> Tensor:
    """By tanh, as in GELU's short form: what the losses of this family are computed with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Denoiser(nn.Module):
    """e' and v [M, 2 C] from x_t [M, C], t [M] and z [N, D]; row m has z of n = m mod N."""

    def __init__(self, width_z: int, channels: int, width: int, depth: int, steps: int):
        super().__init__()
        self.steps = steps
        self.x = nn.Linear(channels, width)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.z = nn.Linear(width_z, width)
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, 2 * channels)
        self.initialise()

    def initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.modulation, self.out):
            nn.init.zeros_(layer.weight)

    def forward(self, x_MC: Tensor, t_M: Tensor, z_ND: Tensor) -> Tensor:
        z_NW = self.z(z_ND)
        condition_MW = F.silu(self.timed(t_M, z_ND.dtype) + z_NW.repeat(len(x_MC) // max(1, len(z_ND)), 1))
        x_MW = self.x(x_MC.to(z_ND.dtype))
        for block in self.blocks:
            x_MW = block(x_MW, condition_MW)
        shift_MW, scale_MW = self.modulation(condition_MW).chunk(2, -1)
        normed_MW = F.layer_norm(x_MW, x_MW.shape[-1:], eps=EPS)
        return self.out(normed_MW * (1 + scale_MW) + shift_MW)

    def timed(self, t_M: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors of times [M, W]. More rows than steps: each step once."""
        if len(t_M) > self.steps:
            return F.embedding(t_M, self.time(waves(torch.arange(self.steps, device=t_M.device)).to(dtype)))
        return self.time(waves(t_M).to(dtype))


class ModulatedBlock(nn.Module):
    """x + gate * MLP(norm(x) * (1 + scale) + shift)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x_MW: Tensor, condition_MW: Tensor) -> Tensor:
        shift_MW, scale_MW, gate_MW = self.modulation(condition_MW).chunk(3, -1)
        return x_MW + gate_MW * self.mlp(self.norm(x_MW) * (1 + scale_MW) + shift_MW)


def waves(t_M: Tensor) -> Tensor:
    """Cosines, then sines of times at wave lengths from 2 pi to 10000 times that [M, 256]. fp64."""
    half = FREQUENCIES // 2
    rate_F = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64, device=t_M.device) / half)
    angle_MF = t_M.double()[:, None] * rate_F
    return torch.cat([angle_MF.cos(), angle_MF.sin()], -1)
