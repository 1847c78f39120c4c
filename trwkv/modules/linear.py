"""The matrices, with the values they start from."""

import math

import torch
from torch import nn


class RwkvLinear(nn.Linear):
    """A matrix without bias that starts as RWKV-4's do.

    Zero with `scale` 0; else orthogonal, its gain `scale` times sqrt(rows / columns) where it has more rows than
    columns.
    """

    def __init__(self, in_features: int, out_features: int, *, scale: float = 1.0) -> None:
        self.scale = scale
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        if self.scale == 0:
            nn.init.zeros_(self.weight)
        else:
            gain = math.sqrt(max(self.out_features / self.in_features, 1))
            if self.weight.dtype in (torch.float16, torch.bfloat16):  # there is no QR in them
                wide = torch.empty_like(self.weight, dtype=torch.float32)
                with torch.no_grad():
                    self.weight.copy_(nn.init.orthogonal_(wide, gain=self.scale * gain))
            else:
                nn.init.orthogonal_(self.weight, gain=self.scale * gain)


class SelectorLinear(nn.Linear):
    """A matrix with bias that starts as the selector of the paper's code does: N(0, 0.01), bias zero."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)
