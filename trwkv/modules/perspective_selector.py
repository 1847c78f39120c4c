"""How P perspectives are merged into one: the weight of each."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trwkv.modules.linear import SelectorLinear

AGGREGATIONS = ("selector", "mean", "fixed", "learned")


class PerspectiveSelector(nn.Module):
    r"""Weights that merge P perspectives; they sum to one over p.

    ========== ======================================== ============ ==================
    aggregation weights                                  shape        parameters
    ========== ======================================== ============ ==================
    selector   softmax_p(W x[t] + b), per token          [B, T, P]    W [P, C], b [P]
    learned    softmax_p(logits)                         [P]          logits [P]
    fixed      the given ones                            [P]          none
    mean       1 / P                                     [P]          none
    ========== ======================================== ============ ==================

    "Multiple temporal perspectives" (arXiv 2402.02625) names all four; W starts from N(0, 0.01), as in its
    code, and b and the learned logits from zero, so that training starts close to the mean.

    Args:
        hidden_size: C, channels of the input the selector looks at.
        n_perspectives: P.
        aggregation: one of the above.
        fixed_weights: P numbers that sum to one; given with "fixed" and only then.
        noise: standard deviation of Gaussian noise added to the selector's logits while training.
    """

    def __init__(
        self,
        hidden_size: int,
        n_perspectives: int,
        *,
        aggregation: str = "selector",
        fixed_weights: Sequence[float] | None = None,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        check_aggregation(aggregation, fixed_weights, n_perspectives)
        self.n_perspectives = n_perspectives
        self.aggregation = aggregation
        self.noise = noise
        self.fixed_weights = None if fixed_weights is None else tuple(fixed_weights)
        if aggregation == "selector":
            self.gate = SelectorLinear(hidden_size, n_perspectives)
        elif aggregation == "learned":
            self.logits = nn.Parameter(torch.zeros(n_perspectives))

    def reset_parameters(self) -> None:
        """Back to the start: the selector's logits small, the learned ones zero."""
        if self.aggregation == "selector":
            self.gate.reset_parameters()
        elif self.aggregation == "learned":
            nn.init.zeros_(self.logits)

    def forward(self, x: Tensor) -> Tensor:
        """Weights for the input x [B, T, C]: [B, T, P] from the selector, [P] from the others; at least
        float32."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.aggregation == "mean":
            return torch.full((self.n_perspectives,), 1 / self.n_perspectives, device=x.device, dtype=dtype)
        if (
            self.fixed_weights is not None
        ):  # filled on the device: nothing to copy there, no buffer to lose precision
            return torch.cat(
                [torch.full((1,), weight, device=x.device, dtype=dtype) for weight in self.fixed_weights]
            )
        logits = self.gate(x) if self.aggregation == "selector" else self.logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.aggregation == "selector" and self.training and self.noise > 0:
            logits = logits + self.noise * torch.randn_like(logits)
        return torch.softmax(logits, dim=-1)

    def extra_repr(self) -> str:
        return f"n_perspectives={self.n_perspectives}, aggregation={self.aggregation!r}, noise={self.noise}"


def merge_perspectives(y: Tensor, weights: Tensor) -> Tensor:
    """`sum_p weights[.., p] y[:, :, p]`: y [B, T, P, C], weights [P] or [B, T, P]; [B, T, C] in y's dtype."""
    return (weights.unsqueeze(-1).to(y.dtype) * y).sum(dim=2)


def check_aggregation(aggregation: str, fixed_weights: Sequence[float] | None, n_perspectives: int) -> None:
    """Raise ValueError unless the three fit each other."""
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation: expected one of {', '.join(AGGREGATIONS)}; got {aggregation!r}")
    if (fixed_weights is not None) != (aggregation == "fixed"):
        raise ValueError(
            "fixed_weights: expected with aggregation 'fixed' and only then; "
            f"got {fixed_weights!r} with {aggregation!r}"
        )
    if fixed_weights is not None and (
        len(fixed_weights) != n_perspectives or not abs(sum(fixed_weights) - 1) <= 1e-6
    ):
        raise ValueError(
            f"fixed_weights: expected {n_perspectives} numbers that sum to 1; got {list(fixed_weights)}"
        )
