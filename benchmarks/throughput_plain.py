"""The op as anyone would write it in PyTorch: vectorised, differentiated by autograd, open to a compiler.

It is the benchmark's contender for `torch.compile`, and in float64 its yardstick for long sequences.
"""

import torch
from torch import Tensor
from torch.nn import functional


def plain_wkv(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, weights: Tensor | None = None, *, chunk: int = 16
) -> Tensor:
    """The output of `multi_perspective_wkv`, in v's dtype, for moderate k (within a channel k varies by less than 80).

    w and u are [P, C] or [C]; k and v [B, T, C] or [B, T, P, C]; weights None or [P, C]. Within a chunk every token
    sums over every other; the sums of whole chunks reach the later ones in log2(T / chunk) steps.
    """
    single, dtype = w.ndim == 1, v.dtype
    if single:
        w, u = w.unsqueeze(0), u.unsqueeze(0)
    if k.ndim == 3:
        k, v = k.unsqueeze(2), v.unsqueeze(2)
    if dtype != torch.float64:
        k, v = k.float(), v.float()
    T = k.shape[1]
    e = torch.exp(k - k.amax(1, keepdim=True).detach())  # in units of the channel's largest token
    e, ev = (
        functional.pad(x, (0, 0, 0, 0, 0, -T % chunk)).unflatten(1, (-1, chunk)) for x in (e, e * v)
    )  # [B, chunks, chunk, 1 or P, C]

    t = torch.arange(chunk, device=w.device)
    steps = (t[:, None] - 1 - t)[..., None, None]  # from token i to token t; -1 is the token itself
    share = torch.where(steps >= 0, torch.exp(steps.clamp(min=0) * w), 0.0)
    share = torch.where(steps == -1, torch.exp(u), share)  # [chunk, chunk, P, C]
    decay = torch.exp(t[:, None, None] * w)  # [chunk, P, C]

    def sums(x: Tensor) -> Tensor:
        """What every token sees of x."""
        carry = (decay.flip(0) * x).sum(2)  # of whole chunks, [B, chunks, P, C]
        carry = functional.pad(carry, (0, 0, 0, 0, 1, 0))[:, :-1]
        chunks, step = carry.shape[1], 1
        while step < chunks:
            earlier = functional.pad(carry, (0, 0, 0, 0, step, 0))[:, :chunks]
            carry = carry + torch.exp(step * chunk * w) * earlier
            step *= 2
        return (share * x.unsqueeze(2)).sum(3) + decay * carry.unsqueeze(2)

    y = (sums(ev) / sums(e)).flatten(1, 2)[:, :T]
    if weights is not None:
        y = (weights * y).sum(2)
    elif single:
        y = y.squeeze(2)
    return y.to(dtype)
