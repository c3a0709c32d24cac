"""What the picture decoder rebuilds: latent tokens of a frozen VAE, a Gaussian each, kept in a file once an item (UTGRec section 3.3).

    bytes -> RGB, short side to the VAE's side, centre crop, [-1, 1] -> encoder -> mean, std [C, h, w] -> P = h w tokens row by row

``KL16`` is the encoder of MAR's KL-16 (Li et al., arXiv 2406.11838): 256 x 256 pixels, 16 x 16 tokens of 16 channels; its weights are
``kl16.ckpt``, by path. ``StandIn`` takes no weights: colours of 4 x 4 fields, for tests and miniatures. ``Moments`` are those of a
domain's pictures, as they are and mirrored; ``sample`` draws latents from them, anew at each use.

Legend: B pictures, I items, M pictures of a domain, C channels, P latent tokens.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from harness.contract import ContractError, Domain, Pictures, write_json
from utgrec.tokenizer.settings import Settings

# -------------------------------------------------------------------------------------------------------------- pictures


STRIP = 200
"""A picture so much longer than wide shows nothing at its centre, and would be enlarged to gigabytes first."""


def pixels(data: bytes, side: int) -> np.ndarray | None:
    """An encoded picture as [side, side, 3] uint8: its centre, as large as fits. None for bytes that are no whole picture, or a strip.

    Halved by averaging while that leaves twice the side, then resized once: large photographs neither alias nor cost a large filter.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd palettes and sizes: either it decodes or it does not
            picture = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if max(picture.size) > STRIP * min(picture.size):
        return None
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return np.array(picture.crop((left, top, left + side, top + side)))


def images(pixels_BHW3: np.ndarray) -> Tensor:
    """[B, 3, H, W] from -1 to 1, of uint8."""
    return torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------------------- encoders


class VAE(nn.Module):
    """A frozen encoder. ``moments``: images [B, 3, side, side] -> mean and std [B, C, h, w], h w = ``latents``."""

    side: int
    """Pixels."""
    latents: int
    """Tokens of a picture."""
    channels: int
    scale: float
    """What a latent is multiplied with to have a variance of about 1."""

    def moments(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    @property
    def digest(self) -> str:
        """SHA-256 of kind and weights: what moments depend on beside the pictures."""
        found = hashlib.sha256(f"{type(self).__name__} {self.side} {self.latents} {self.channels} {self.scale}".encode())
        for name, value in sorted(self.state_dict().items()):
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()


class StandIn(VAE):
    """No network: the mean colours of 4 x 4 fields, turned by a fixed orthogonal matrix and standardised for product photographs."""

    side, latents, channels, scale = 32, 16, 3, 2.0
    CENTRE, STD = 0.6, 0.05

    def __init__(self, seed: int = 0):
        super().__init__()
        turn = np.linalg.qr(np.random.default_rng([seed, 16]).standard_normal((3, 3)))[0]
        self.register_buffer("turn_33", torch.from_numpy(turn).float())
        self.freeze()

    def moments(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        colours_B3hw = F.avg_pool2d(images_B3HW, self.side // 4) - self.CENTRE
        mean_BChw = torch.einsum("cd,bdhw->bchw", self.turn_33, colours_B3hw)
        return mean_BChw, torch.full_like(mean_BChw, self.STD)


class KL16(VAE):
    """The encoder of KL-16 (28.3M weights), named as in its checkpoint."""

    side, latents, channels, scale = 256, 256, 16, 0.2325
    IGNORED = ("decoder.", "post_quant_conv.", "loss.")
    """Parts of the checkpoint that only the way back from latents, or its training, needs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _Encoder(128, (1, 1, 2, 2, 4), 2 * self.channels)
        self.quant_conv = nn.Conv2d(2 * self.channels, 2 * self.channels, 1)
        self.freeze()

    @classmethod
    def load(cls, path: Path | str, digest: str = "") -> KL16:
        """From ``kl16.ckpt``. ``digest``: the SHA-256 it must have; empty: any. Raises ContractError for any other file."""
        path = Path(path)
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ContractError(f"vae = {str(path)!r} cannot be read ({error}); fetch MAR's kl16.ckpt, or use 'stand-in'") from error
        if digest and digest.lower() != found:
            raise ContractError(f"{path}: its SHA-256 is {found}, vae_digest is {digest}; fetch the file again, or correct the setting")
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
            own = {name: value for name, value in weights.items() if not name.startswith(cls.IGNORED)}
        except Exception as error:  # torch.load raises many kinds for a file that is none of its own
            raise ContractError(f"{path}: no checkpoint with weights under 'model' ({type(error).__name__}: {error})") from error
        vae = cls()
        try:
            vae.load_state_dict(own)
        except RuntimeError as error:
            raise ContractError(f"{path}: not the weights of KL-16's encoder: {error}") from error
        return vae

    def moments(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        mean_BCHW, log_variance_BCHW = self.quant_conv(self.encoder(images_B3HW)).chunk(2, 1)
        return mean_BCHW, torch.exp(log_variance_BCHW.clamp(-30, 20) / 2)


def make_vae(settings: Settings) -> VAE:
    return StandIn() if settings.vae == "stand-in" else KL16.load(settings.vae, settings.vae_digest)


class _Encoder(nn.Module):
    """Two residual blocks a level, halved between levels; attention in the last level and in the middle."""

    def __init__(self, width: int, multiples: tuple[int, ...], out: int, blocks: int = 2):
        super().__init__()
        widths = [width * multiple for multiple in multiples]
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for number, (before, after) in enumerate(itertools.pairwise([width, *widths])):
            level = nn.Module()
            level.block = nn.ModuleList(_Residual(before if first == 0 else after, after) for first in range(blocks))
            last = number == len(widths) - 1
            level.attn = nn.ModuleList(_Attention(after) for _ in range(blocks if last else 0))
            if not last:
                level.downsample = _Halve(after)
            self.down.append(level)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = _Residual(after, after), _Attention(after), _Residual(after, after)
        self.norm_out, self.conv_out = _norm(after), nn.Conv2d(after, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block, attention in itertools.zip_longest(level.block, level.attn):
                x = block(x)
                x = attention(x) if attention else x
            x = level.downsample(x) if hasattr(level, "downsample") else x
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class _Residual(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = _norm(after), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return inner + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Attention(nn.Module):
    """One head over all places."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x_BDHW: Tensor) -> Tensor:
        normed_BDHW = self.norm(x_BDHW)
        q, k, v = (layer(normed_BDHW).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        read_BDHW = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x_BDHW.shape)
        return x_BDHW + self.proj_out(read_BDHW)


class _Halve(nn.Module):
    """Padded at the right and at the bottom only."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


# -------------------------------------------------------------------------------------------------------------- moments

BLOCK = 64
"""Pictures that are encoded together, and between two marks of progress."""


class Moments:
    """Mean and std of the latents of a domain's pictures, in a memory-mapped file: float16, 32 kB a picture with KL-16.

    An item whose picture cannot be decoded has none, like one without picture.
    """

    def __init__(self, path: Path, items_M: np.ndarray, unreadable: list[int], vae: VAE):
        self.path, self.scale = path, vae.scale
        self._row = {item: row for row, item in enumerate(items_M.tolist())}
        for item in unreadable:
            del self._row[item]
        self.unreadable = len(unreadable)
        self._shape = _shape(len(items_M), vae)
        self._table: np.ndarray | None = None

    @classmethod
    def of(cls, domain: Domain, vae: VAE, cache: Path, told: Callable[[int, int], None] | None = None) -> Moments:
        """Read them from ``cache``, or make them there first; a process killed at it is gone on from, by block.

        ``told``: called with how many of how many pictures are done. Processes that want the same file wait for the one that makes it.
        """
        items_M = np.array([item for item in range(domain.n_items) if item in domain.pictures], np.int64)
        key = f"{domain.name}-{digest_of_pictures(domain)[:16]}-{vae.digest[:16]}"
        folder = Path(cache) / "moments"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{key}.f16"
        with open(folder / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _make(path, domain.pictures, items_M, vae, told)
        return cls(path, items_M, _progress(path)["unreadable"], vae)

    @property
    def table(self) -> np.ndarray:
        """[M, 2, 2, P, C]: of the picture and its mirror image, mean and std. Opened at first use: a copy in a worker opens its own."""
        if self._table is None:
            wanted, size = 2 * int(np.prod(self._shape)), self.path.stat().st_size
            if size != wanted:
                raise ContractError(f"{self.path} has {size:,} bytes, {wanted:,} are expected; delete it, and it is made again")
            self._table = np.memmap(self.path, np.float16, "r", shape=self._shape) if wanted else np.empty(self._shape, np.float16)
        return self._table

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, item: int) -> bool:
        return item in self._row

    def sample(self, item: int, rng: np.random.Generator) -> Tensor:
        """Latent tokens of the item's picture or, half of the time, of its mirror image: [P, C], drawn from the VAE's posterior."""
        mean_PC, std_PC = self.table[self._row[item], int(rng.random() < 0.5)].astype(np.float32)
        return torch.from_numpy((mean_PC + std_PC * rng.standard_normal(mean_PC.shape, np.float32)) * np.float32(self.scale))


def digest_of_pictures(domain: Domain) -> str:
    """SHA-256 of the pictures' index, which has the digest of each."""
    path = domain.path / "pictures.parquet"
    return hashlib.sha256(path.read_bytes() if path.exists() else b"").hexdigest()


def _shape(pictures: int, vae: VAE) -> tuple[int, ...]:
    return pictures, 2, 2, vae.latents, vae.channels


def _progress(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.with_suffix(".json").read_text())
    except FileNotFoundError:
        return {"done": 0, "unreadable": []}


def _make(path: Path, pictures: Pictures, items_M: np.ndarray, vae: VAE, told: Callable[[int, int], None] | None) -> None:
    """Block by block into a file beside ``path``, which takes its name when it is whole."""
    part, shape = path.with_suffix(".part"), _shape(len(items_M), vae)
    progress = _progress(path) if part.exists() else {"done": 0, "unreadable": []}
    if not part.exists():
        with open(part, "wb") as file:
            file.truncate(2 * int(np.prod(shape)))
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        for rows, read in _blocks(pool, pictures, items_M, vae.side, progress["done"]):
            table = np.memmap(part, np.float16, "r+", shape=shape)
            there = [row for row, picture in zip(rows, read, strict=True) if picture is not None]
            if there:
                table[there] = _encode(vae, np.stack([picture for picture in read if picture is not None]))
            table.flush()
            progress["unreadable"] += [int(items_M[row]) for row in rows if row not in there]
            progress["done"] = rows[-1] + 1
            write_json(path.with_suffix(".json"), progress)
            if told:
                told(progress["done"], len(items_M))
    write_json(path.with_suffix(".json"), progress)
    os.replace(part, path)


def _blocks(
    pool: ThreadPoolExecutor, pictures: Pictures, items_M: np.ndarray, side: int, done: int
) -> Iterator[tuple[range, list[np.ndarray | None]]]:
    """Rows and their decoded pictures; the next block is decoded while this one is encoded."""
    ahead = None
    for first in range(done, len(items_M) + BLOCK, BLOCK):
        rows = range(first, min(first + BLOCK, len(items_M)))
        data = pictures.many(items_M[rows.start : rows.stop].tolist()) if rows else []
        coming = rows, [pool.submit(pixels, picture or b"", side) for picture in data]
        if ahead and ahead[0]:
            yield ahead[0], [future.result() for future in ahead[1]]
        ahead = coming


@torch.no_grad()
def _encode(vae: VAE, pixels_BHW3: np.ndarray) -> np.ndarray:
    """[B, 2, 2, P, C] float16: of pictures and their mirror images, mean and std."""
    device = next(itertools.chain(vae.parameters(), vae.buffers())).device
    images_B3HW = images(pixels_BHW3).to(device)
    sides = [torch.stack(vae.moments(view), 1) for view in (images_B3HW, images_B3HW.flip(-1))]  # [B, 2, C, h, w] each
    return torch.stack(sides, 1).flatten(-2).transpose(-1, -2).half().cpu().numpy()
