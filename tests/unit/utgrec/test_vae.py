"""Frozen encoders of pictures, and the moments of a domain in their file."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from harness.contract import ContractError, Pictures
from harness.data.simulate import COLOURS, product_picture
from utgrec.tokenizer import vae as vae_module
from utgrec.tokenizer.settings import Settings
from utgrec.tokenizer.vae import KL16, VAE, Moments, StandIn, images, make_vae, pixels


def encoded(picture: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind)
    return out.getvalue()


# -------------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_of_the_right_size_is_itself() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert np.array_equal(pixels(encoded(picture), 32), picture)
    scaled = images(np.array([[[[0, 127, 255]]]], np.uint8))[0, :, 0, 0]
    torch.testing.assert_close(scaled, torch.tensor([-1, 2 * 127 / 255 - 1, 1]))


@pytest.mark.parametrize(("height", "width"), [(32, 57), (57, 32), (64, 64), (300, 211), (20, 9), (33, 700)])
def test_the_centre_is_cut_after_halving_and_one_bicubic_step(height: int, width: int) -> None:
    """By the steps of the specification, one at a time: BOX while the short side is twice the target, BICUBIC, centre by floor."""
    picture = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    expected = Image.fromarray(picture)
    while min(expected.size) >= 64:
        expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.BOX)
    factor = 32 / min(expected.size)
    expected = np.array(expected.resize(tuple(round(x * factor) for x in expected.size), resample=Image.BICUBIC))
    top, left = (expected.shape[0] - 32) // 2, (expected.shape[1] - 32) // 2
    assert np.array_equal(pixels(encoded(picture), 32), expected[top : top + 32, left : left + 32])


def test_palettes_greys_and_alpha_become_rgb() -> None:
    for mode in ("P", "L", "RGBA", "CMYK"):
        out = io.BytesIO()
        Image.new(mode, (40, 50)).save(out, "TIFF")
        assert pixels(out.getvalue(), 32).shape == (32, 32, 3)


def test_what_is_no_whole_picture_is_none() -> None:
    good = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "JPEG")
    for data in (b"", b"no picture", good[: len(good) // 2], encoded(np.zeros((1, 300, 3), np.uint8))):
        assert pixels(data, 32) is None


# ------------------------------------------------------------------------------------------------------------- encoders


def test_the_stand_in_keeps_colours() -> None:
    """The nearest of ten mean latents names the colour of a product whose shape, size and place vary: over 70 % where chance is 10 %."""
    torch.manual_seed(0)
    vae, right = StandIn(0), []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        kinds = np.repeat(np.arange(len(COLOURS)), 60)
        shown = np.stack([pixels(product_picture(COLOURS[kind], rng), 32) for kind in kinds])
        mean_BChw, std_BChw = vae.moments(images(shown))
        assert mean_BChw.shape == std_BChw.shape == (len(kinds), vae.channels, 4, 4)
        latents = vae.scale * (mean_BChw + std_BChw * torch.randn_like(mean_BChw))
        assert 0.5 < latents.std() < 1.5 and abs(latents.mean()) < 0.5
        centre = latents[:, :, 1:3, 1:3].mean((2, 3)).numpy()
        means = np.stack([centre[kinds == kind][:30].mean(0) for kind in range(len(COLOURS))])
        held_out = np.concatenate([np.flatnonzero(kinds == kind)[30:] for kind in range(len(COLOURS))])
        guess = np.linalg.norm(centre[held_out][:, None] - means, axis=-1).argmin(1)
        right.append((guess == kinds[held_out]).mean())
    assert np.mean(right) > 0.7


def test_the_stand_in_is_an_orthogonal_map_fixed_by_its_seed() -> None:
    first, again, other = StandIn(4), StandIn(4), StandIn(5)
    assert first.digest == again.digest != other.digest
    torch.testing.assert_close(first.turn_33 @ first.turn_33.T, torch.eye(3))
    assert not list(first.parameters())


@pytest.fixture(scope="module")
def kl16() -> KL16:
    torch.manual_seed(0)
    vae = KL16()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return vae


def checkpoint(vae: KL16, path: Path, **changes: Tensor | None) -> Path:
    """MAR's file: the whole autoencoder under ``model``."""
    weights = vae.state_dict() | {"decoder.conv_in.weight": torch.zeros(2), "post_quant_conv.weight": torch.zeros(1)} | changes
    torch.save({"model": {name: value for name, value in weights.items() if value is not None}}, path)
    return path


def test_kl16_has_the_weights_of_the_encoder(kl16: KL16) -> None:
    assert sum(p.numel() for p in kl16.parameters()) == 28_266_816
    assert not any(p.requires_grad for p in kl16.parameters()) and not kl16.training
    names = set(kl16.state_dict())
    assert {"encoder.conv_in.weight", "encoder.down.2.block.0.nin_shortcut.weight", "encoder.down.4.attn.1.proj_out.bias"} <= names
    assert {"encoder.down.3.downsample.conv.weight", "encoder.mid.attn_1.q.weight", "encoder.norm_out.bias", "quant_conv.weight"} <= names
    assert not any(name.startswith(("encoder.down.4.downsample", "encoder.down.3.attn")) for name in names)


def test_kl16_moments(kl16: KL16) -> None:
    with torch.no_grad():
        mean, std = kl16.moments(torch.rand(1, 3, 64, 64) * 2 - 1)  # convolutions take any size: 4 x 4 tokens
        assert mean.shape == std.shape == (1, 16, 4, 4)
        assert (std > 0).all()
        bias = kl16.quant_conv.bias.clone()
        kl16.quant_conv.bias[16:24], kl16.quant_conv.bias[24:] = 1e4, -1e4
        _, clamped = kl16.moments(torch.zeros(1, 3, 32, 32))
        kl16.quant_conv.bias.copy_(bias)
    torch.testing.assert_close(clamped[0, :8], torch.full((8, 2, 2), float(np.exp(10))))
    torch.testing.assert_close(clamped[0, 8:], torch.full((8, 2, 2), float(np.exp(-15))))


def test_a_checkpoint_loads_by_path_and_digest(kl16: KL16, tmp_path: Path) -> None:
    path = checkpoint(kl16, tmp_path / "kl16.ckpt")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert make_vae(Settings(vae=str(path), vae_digest=digest)).digest == KL16.load(path).digest == kl16.digest
    assert isinstance(make_vae(Settings()), StandIn)
    with pytest.raises(ContractError, match=f"SHA-256 is {digest}, vae_digest is 00"):
        KL16.load(path, "00")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_conv.bias": None}, "quant_conv.bias"),
        ({"encoder.mid.attn_2.q.weight": torch.zeros(1)}, r"encoder.mid.attn_2.q.weight"),
        ({"ema.decay": torch.zeros(1)}, "ema.decay"),
        ({"encoder.conv_out.bias": torch.zeros(8)}, "encoder.conv_out.bias"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(kl16: KL16, tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(ContractError, match=named):
        KL16.load(checkpoint(kl16, tmp_path / "kl16.ckpt", **changes))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"nowhere.*fetch"):
        KL16.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ContractError, match=r"text: no checkpoint"):
        KL16.load(tmp_path / "text")
    torch.save({"weights": {}}, tmp_path / "other")
    with pytest.raises(ContractError, match="under 'model'"):
        KL16.load(tmp_path / "other")


# -------------------------------------------------------------------------------------------------------------- moments

WITHOUT = {3, 7}
BROKEN = 5


def domain_of(folder: Path, n_items: int = 12, seed: int = 0) -> SimpleNamespace:
    """What Moments reads of a domain. Items 3 and 7 have no picture, that of 5 is cut off."""
    folder.mkdir(exist_ok=True)
    rng, packed, rows = np.random.default_rng(seed), b"", []
    for item in range(n_items):
        if item in WITHOUT:
            continue
        data = product_picture(COLOURS[item % len(COLOURS)], rng)
        data = data[:300] if item == BROKEN else data
        rows.append((item, len(packed), len(data), hashlib.sha256(data).hexdigest()))
        packed += data
    (folder / "pictures.bin").write_bytes(packed)
    pq.write_table(
        pa.table(dict(zip(("item", "offset", "length", "sha256"), zip(*rows, strict=True), strict=True))), folder / "pictures.parquet"
    )
    return SimpleNamespace(name="toys", path=folder, n_items=n_items, pictures=Pictures(folder))


@pytest.fixture
def blocks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_module, "BLOCK", 4)


class Counting(StandIn):
    """Counts its calls, and is killed at one of them."""

    calls, last = 0, 99

    def moments(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        if self.calls == self.last:
            raise KeyboardInterrupt
        self.calls += 1
        return super().moments(images_B3HW)


@pytest.mark.usefixtures("blocks_of_four")
def test_moments_are_those_of_the_vae(tmp_path: Path) -> None:
    domain, vae, told = domain_of(tmp_path / "toys"), StandIn(), []
    moments = Moments.of(domain, vae, tmp_path / "cache", told=lambda done, of: told.append((done, of)))
    assert told == [(4, 10), (8, 10), (10, 10)]
    assert [item for item in range(-1, 13) if item in moments] == [0, 1, 2, 4, 6, 8, 9, 10, 11]
    assert len(moments) == 9 and moments.unreadable == 1
    for item, row in ((0, 0), (6, 5), (11, 9)):
        picture = images(pixels(domain.pictures[item], 32)[None])
        for flipped in (False, True):
            expected = [part[0].flatten(1).T for part in vae.moments(picture.flip(-1) if flipped else picture)]
            for found, part in zip(moments.table[row, int(flipped)], expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(found.astype(np.float32)), part, atol=1e-3, rtol=1e-3)


def test_samples_have_the_posteriors_mean_and_deviation(tmp_path: Path) -> None:
    moments = Moments.of(domain_of(tmp_path / "toys"), StandIn(), tmp_path)
    drawn = torch.stack([moments.sample(8, np.random.default_rng([2, n])) for n in range(4000)])
    assert drawn.shape == (4000, 16, 3) and drawn.dtype == torch.float32
    mean_FPC, std_FPC = 2.0 * torch.from_numpy(moments.table[6].astype(np.float32)).transpose(0, 1)
    torch.testing.assert_close(drawn.mean(0), mean_FPC.mean(0), atol=0.06, rtol=0)
    expected = std_FPC[0].square() + (mean_FPC[0] - mean_FPC[1]).square() / 4  # either view half of the time
    torch.testing.assert_close(drawn.var(0), expected, atol=0.01, rtol=0.1)
    again = moments.sample(8, np.random.default_rng([2, 0]))
    assert torch.equal(again, drawn[0])


@pytest.mark.usefixtures("blocks_of_four")
@pytest.mark.parametrize("last", [0, 2, 4])
def test_a_killed_making_goes_on_and_ends_the_same(tmp_path: Path, last: int) -> None:
    domain, vae = domain_of(tmp_path / "toys"), Counting()
    whole = Moments.of(domain, Counting(), tmp_path / "whole")
    vae.last = last
    with pytest.raises(KeyboardInterrupt):
        Moments.of(domain, vae, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.f16"))
    vae.last = 99
    resumed = Moments.of(domain, vae, tmp_path / "cache")
    assert vae.calls == 6  # of three blocks, both views, none made twice
    assert np.array_equal(resumed.table, whole.table)
    assert len(resumed) == 9
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.usefixtures("blocks_of_four")
def test_a_kill_before_the_file_gets_its_name(tmp_path: Path) -> None:
    domain, vae = domain_of(tmp_path / "toys"), Counting()
    path = Moments.of(domain, vae, tmp_path).path
    path.rename(path.with_suffix(".part"))
    assert len(Moments.of(domain, vae, tmp_path)) == 9
    assert vae.calls == 6


def test_made_once_and_anew_for_other_pictures_or_another_vae(tmp_path: Path) -> None:
    domain, vae = domain_of(tmp_path / "toys"), Counting()
    path = Moments.of(domain, vae, tmp_path).path
    assert Moments.of(domain, vae, tmp_path).path == path and vae.calls == 2
    paths = {path, Moments.of(domain, Counting(1), tmp_path).path, Moments.of(domain_of(tmp_path / "more", seed=1), vae, tmp_path).path}
    assert len(paths) == 3


def test_a_copy_in_a_worker_opens_its_own_file(tmp_path: Path) -> None:
    moments = Moments.of(domain_of(tmp_path / "toys"), StandIn(), tmp_path)
    expected = moments.sample(2, np.random.default_rng(0))
    sent = pickle.dumps(moments)
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent).sample(2, np.random.default_rng(0)), expected)


def test_a_torn_file_is_named_with_the_mend(tmp_path: Path) -> None:
    domain = domain_of(tmp_path / "toys")
    path = Moments.of(domain, StandIn(), tmp_path).path
    with open(path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(ContractError, match=r"100 bytes, 3,840 are expected; delete it"):
        Moments.of(domain, StandIn(), tmp_path).sample(0, np.random.default_rng(0))


def test_a_domain_without_pictures(tmp_path: Path) -> None:
    domain = SimpleNamespace(name="bare", path=tmp_path, n_items=5, pictures=Pictures(tmp_path))
    moments = Moments.of(domain, StandIn(), tmp_path / "cache")
    assert len(moments) == 0 and 0 not in moments
    assert json.loads(moments.path.with_suffix(".json").read_text()) == {"done": 0, "unreadable": []}


def test_every_vae_says_what_the_decoder_needs() -> None:
    for kind in (StandIn, KL16):
        assert issubclass(kind, VAE) and all(hasattr(kind, name) for name in ("side", "latents", "channels", "scale"))
