"""Pictures become the patches that transformers' own image processor makes of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.utgrec.encoders import picture
from utgrec.tokenizer.pictures import SQUARE, fitted, normalised, read_picture


@pytest.mark.parametrize(
    ("width", "height", "squares"), [(500, 500, (18, 18)), (333, 500, (12, 18)), (100, 100, (12, 12)), (1500, 1500, (32, 32))]
)
def test_sizes_are_those_of_the_specification(width: int, height: int, squares: tuple[int, int]) -> None:
    assert fitted(width, height, 128, 1024) == squares


def test_sizes_are_those_of_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(0)
    sizes = [(int(width), int(height)) for width, height in rng.integers(15, 2000, (300, 2))]
    for width, height in sizes + [(side, side) for side in range(20, 1600, 7)]:
        down, across = smart_resize(height, width, SQUARE, 128 * SQUARE**2, 1024 * SQUARE**2)
        assert fitted(width, height, 128, 1024) == (across // SQUARE, down // SQUARE)


@pytest.mark.parametrize(("width", "height"), [(3000, 1), (1, 3000), (7, 5), (29, 31)])
def test_every_shape_gets_a_size_within_the_limits(width: int, height: int) -> None:
    across, down = fitted(width, height, 4, 64)
    assert across >= 1
    assert down >= 1
    assert across * down <= max(64, 200)


def test_patches_are_those_of_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (84, 140, 3), np.uint8)  # multiples of 28: nothing is resized
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    patches_PC, grid = read_picture(out.getvalue(), 1, 100)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": SQUARE**2, "longest_edge": 100 * SQUARE**2})
    theirs = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
    assert [list(grid)] == theirs["image_grid_thw"].tolist() == [[1, 6, 10]]
    assert patches_PC.dtype == np.uint8
    assert torch.allclose(normalised(torch.from_numpy(patches_PC)), theirs["pixel_values"], atol=1e-5)


def test_what_is_transparent_is_white() -> None:
    pixels = np.zeros((28, 28, 4), np.uint8)
    pixels[:14, :, 3] = 255
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(out, "PNG")
    patches_PC, _ = read_picture(out.getvalue(), 1, 4)
    assert patches_PC[:2].max() == 0
    assert patches_PC[2:].min() == 255


@pytest.mark.parametrize("data", [b"", b"no picture", picture()[:400]], ids=["empty", "text", "cut off"])
def test_what_cannot_be_decoded_is_no_picture(data: bytes) -> None:
    assert read_picture(data, 1, 4) is None
