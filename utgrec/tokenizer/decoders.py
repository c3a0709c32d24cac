"""The dual decoders: an item's text and picture from the vectors of its codes (UTGRec section 3.3).

    text:     layer([codes 1..L ; masked text])        -> hidden states of the text, for the output table of the language model
    picture:  layer([codes 1..L ; P times one vector]) -> z, on which the diffusion loss is conditioned (diffusion.py)

Both are one bidirectional layer (block.py) with a final norm and weights of their own. Positions run on through codes and content; latent
tokens of a picture stand row by row, without a second coordinate. There is no projection of latents: all of them are replaced by
the learned vector.

Legend: B rows, L codes, T text tokens, P latent tokens, S = L + T or L + P, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utgrec.tokenizer.block import Block, BlockShape, RMSNorm


class TextDecoder(nn.Module):
    def __init__(self, shape: BlockShape):
        super().__init__()
        self.block, self.norm = Block(shape), RMSNorm(shape.width, shape.eps)

    def forward(self, prefix_BLW: Tensor, embedded_BTW: Tensor, keep_BT: Tensor) -> Tensor:
        """Hidden states [B, T, W]. ``keep_BT``: False at padding, whose own states mean nothing."""
        codes = prefix_BLW.size(1)
        keep_BS = F.pad(keep_BT, (codes, 0), value=True)
        x_BSW = self.block(torch.cat([prefix_BLW, embedded_BTW], 1), keep_BS)
        return self.norm(x_BSW[:, codes:])


class PictureDecoder(nn.Module):
    def __init__(self, shape: BlockShape, latents: int = 256):
        super().__init__()
        self.block, self.norm = Block(shape), RMSNorm(shape.width, shape.eps)
        self.latents, self.mask_W = latents, nn.Parameter(torch.empty(shape.width).normal_(std=0.02))

    def forward(self, prefix_BLW: Tensor) -> Tensor:
        """z [B, P, W]."""
        codes = prefix_BLW.size(1)
        masks_BPW = self.mask_W.expand(len(prefix_BLW), self.latents, -1)
        return self.norm(self.block(torch.cat([prefix_BLW, masks_BPW], 1))[:, codes:])
