"""Cross-entropy as one writes it: all logits, torch's loss, automatic gradients. Under autocast the products are in its precision.

What the released tokenizer training does with the logits of its text decoder, but for the selected tokens alone.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def full_logits(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """The sum over tokens, in fp32."""
    return F.cross_entropy((hidden_ND @ head_VD.T).float(), targets_N, reduction="sum")
