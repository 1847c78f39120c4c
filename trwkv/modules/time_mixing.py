"""RWKV-4's time mixing under P temporal perspectives."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trwkv.modules.arguments import check_differ, check_input, check_whole_number, chosen_vectors
from trwkv.modules.linear import RwkvLinear
from trwkv.modules.perspective_selector import PerspectiveSelector, merge_perspectives
from trwkv.modules.token_shift import absent, last_token, shift_and_mix
from trwkv.ops import gated_recurrent_wkv, multi_perspective_wkv
from trwkv.ops._dispatch import resolve_backend
from trwkv.ops._library import is_plain_inference
from trwkv.ops.wkv.autograd import RECURRENT_MAX_T

TIME_VECTORS = ("time_decay", "time_first", "time_mix_k", "time_mix_v", "time_mix_r")

# A key whose weight exp(k) is zero beside any real one, finite so that the state stays finite, and within
# float16.
_MASKED_KEY = -1e4


class TimeMixingOutput(NamedTuple):
    """Output of `TimeMixing`, and the two states after the last token (None unless asked for)."""

    output: Tensor
    shift_state: Tensor | None
    wkv_state: Tensor | None


class TimeMixing(nn.Module):
    r"""RWKV-4's time mixing (arXiv 2305.13048, equations 11 to 13, 16, 17), under P perspectives.

    With x' the previous token and mu the time mixes::

        k = W_k (mu_k x + (1 - mu_k) x')      v, r alike
        y[p] = WKV(k, v; w[p] = -exp(time_decay[p]), u[p] = time_first[p])
        output = W_o (sigmoid(r) * sum_p weights[p] y[p])

    `time_decay` is the log of the negated log decay per step, `time_first` a bonus in the units of k.

    Two forms:

    * with a `selector`, x is [B, T, C] and the perspectives live inside this layer: merged right after the
      WKV. k and v are shared by all P, and every matrix works once, unless "time_mix_k"
      or "time_mix_v" are among `perspective_vectors`: then that matrix multiplies P inputs ("time_mix_r"
      likewise for the receptance, and the merge follows the gate).
    * without one and P > 1, x is [B, T, P, C]: P residual streams side by side, never merged here.

    Args:
        hidden_size: C.
        attention_hidden_size: channels A of k, v, r; None is C.
        n_perspectives: P.
        perspective_vectors: which of `TIME_VECTORS` have one row per perspective ([P, channels], else
            [channels]).
        selector: merges the perspectives; None keeps them apart (or P = 1).
        perspective_noise: see `initial_values`.
        layer_index, n_layers: place in the model, for the initial values.
        backend: of the ops.

    Raises:
        ValueError: an unknown vector, none with a selector and P > 1, a selector of another P, P < 1.
    """

    time_decay: nn.Parameter
    time_first: nn.Parameter
    time_mix_k: nn.Parameter
    time_mix_v: nn.Parameter
    time_mix_r: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        attention_hidden_size: int | None = None,
        *,
        n_perspectives: int = 1,
        perspective_vectors: Sequence[str] = (),
        selector: PerspectiveSelector | None = None,
        perspective_noise: float = 0.0,
        layer_index: int = 0,
        n_layers: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_whole_number("n_perspectives", n_perspectives)
        perspective_vectors = chosen_vectors(perspective_vectors, TIME_VECTORS)
        if selector is not None:  # without one the streams may differ by what is around this layer
            check_differ(perspective_vectors, n_perspectives)
            if selector.n_perspectives != n_perspectives:
                raise ValueError(
                    f"selector: expected one of n_perspectives = {n_perspectives}; got one of {selector.n_perspectives}"
                )
        attention_hidden_size = attention_hidden_size or hidden_size
        self.hidden_size = hidden_size
        self.n_perspectives = n_perspectives
        self.perspective_vectors = tuple(perspective_vectors)
        self.perspective_noise = perspective_noise
        self.layer_index, self.n_layers = layer_index, n_layers
        self.backend = backend
        self.selector = selector
        for name in TIME_VECTORS:
            channels = hidden_size if name.startswith("time_mix") else attention_hidden_size
            shape = vector_shape(channels, n_perspectives, name in perspective_vectors)
            dtype = torch.get_default_dtype()
            if name in ("time_decay", "time_first"):  # whatever the type of the rest
                dtype = torch.promote_types(dtype, torch.float32)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))
        self.key = RwkvLinear(hidden_size, attention_hidden_size, scale=0)
        self.value = RwkvLinear(hidden_size, attention_hidden_size)
        self.receptance = RwkvLinear(hidden_size, attention_hidden_size, scale=0)
        self.output = RwkvLinear(attention_hidden_size, hidden_size, scale=0)
        self.reset_parameters()

    def initial_values(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each vector with the value it starts from: RWKV-4's curves over the channels.

        With P > 1, so that training can tell the perspectives apart, the rows of `time_decay` (where it has
        rows) are moved apart evenly by -1 .. 1, a factor of e^2 in the decay rate between the slowest and the
        fastest, and every row of every vector but the first gets `perspective_noise` (see
        `perspective_rows`).
        """
        depth = self.layer_index / max(self.n_layers - 1, 1)  # 0 at the first layer, 1 at the last
        height = 1 - self.layer_index / self.n_layers  # 1 at the first layer, almost 0 at the last
        channels, attention_channels = self.key.in_features, self.key.out_features
        i = torch.arange(attention_channels, dtype=torch.float32)
        position = torch.arange(channels, dtype=torch.float32) / channels
        zigzag = 0.5 * ((i + 1) % 3 - 1)
        values = {
            "time_decay": -5 + 8 * (i / max(attention_channels - 1, 1)) ** (0.7 + 1.3 * depth),
            "time_first": math.log(0.3) + zigzag,
            "time_mix_k": position**height,
            "time_mix_v": position**height + 0.3 * depth,
            "time_mix_r": position ** (0.5 * height),
        }
        for name, value in values.items():
            parameter = getattr(self, name)
            if parameter.ndim == 2:
                value = perspective_rows(value, self.n_perspectives, self.perspective_noise)
                if name == "time_decay":
                    p = torch.arange(self.n_perspectives).unsqueeze(1)
                    value = value + (2 * p / (self.n_perspectives - 1) - 1)
            yield parameter, value.to(parameter)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The vectors on their curves (the matrices look after themselves: value orthogonal, the others zero)."""
        for parameter, value in self.initial_values():
            parameter.copy_(value)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        shift_state: Tensor | None = None,
        wkv_state: Tensor | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
        scale: float = 1.0,
    ) -> TimeMixingOutput:
        """Mix over time.

        Args:
            x: [B, T, C], or [B, T, P, C] for P streams.
            mask: bool [B, T], False where there is no token. Those must come before all tokens of their row,
                with a fresh state; they then leave the state fresh. Their output means nothing.
            shift_state: x before the first token, [B, C] or [B, P, C]; None at the start of a sequence.
            wkv_state: the op's state, float32 [B, 3, P, A]; None at the start of a sequence.
            output_state: return both states after the last token.
            cu_seqlens: packed sequences, [N + 1] int32 or int64, as `multi_perspective_wkv` takes them: each is
                computed as if it were alone. B is 1 then, the states have N where they have B, and there is no mask.
            scale: factor of the output, which is multiplied before the last matrix: behind it float16 may overflow.

        Raises:
            TypeError: a cu_seqlens that is no tensor of whole numbers.
            ValueError: x, mask, a state or cu_seqlens of another shape, bounds that do not rise from 0 to T, both
                mask and cu_seqlens.
        """
        is_streams = self.selector is None and self.n_perspectives > 1
        n_streams = self.n_perspectives if is_streams else None
        check_input(x, self.hidden_size, n_streams, mask=mask, shift_state=shift_state, cu_seqlens=cu_seqlens)
        if mask is not None:
            x = x.masked_fill(absent(mask, x.ndim), 0)
        mixes = self.time_mix_k, self.time_mix_v, self.time_mix_r
        for_k, for_v, for_r = shift_and_mix(x, mixes, shift_state, cu_seqlens, self.backend)
        k, v, r = self.key(for_k), self.value(for_v), self.receptance(for_r)
        if mask is not None:
            k = k.masked_fill(absent(mask, k.ndim), _MASKED_KEY)
        if k.ndim != v.ndim:
            k, v = (
                z if z.ndim == 4 else z.unsqueeze(2).expand(-1, -1, self.n_perspectives, -1) for z in (k, v)
            )
        y, wkv_state = self._wkv(k, v, r, x, wkv_state, output_state, cu_seqlens)
        shift_state = last_token(x, shift_state, cu_seqlens) if output_state else None
        return TimeMixingOutput(self.output(y if scale == 1.0 else scale * y), shift_state, wkv_state)

    def _wkv(
        self,
        k: Tensor,
        v: Tensor,
        r: Tensor,
        x: Tensor,
        state: Tensor | None,
        output_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """sigmoid(r) * WKV, merged where there is a selector: [B, T, A], or [B, T, P, A] for streams."""
        w = (-torch.exp(_wide(self.time_decay))).expand(self.n_perspectives, -1)
        u = self.time_first.expand(self.n_perspectives, -1)
        weights = None if self.selector is None else self.selector(x)
        if cu_seqlens is None and self._is_decoding_step(w, u, k, v, r, weights, state):
            receptance = r.unsqueeze(2) if weights is None and r.ndim == 3 else r
            y, state = gated_recurrent_wkv(
                w, u, k, v, receptance, weights=weights, initial_state=state, backend=self.backend
            )
            return y.reshape(r.shape), state if output_state else None
        r = torch.sigmoid(r)
        y, state = multi_perspective_wkv(
            w,
            u,
            k,
            v,
            weights=None if r.ndim == 4 else weights,
            initial_state=state,
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        if weights is not None and r.ndim == 4:  # a receptance per perspective: it comes before the merge
            return merge_perspectives(r * y, weights), state
        return r * (y.reshape(r.shape) if weights is None else y), state

    def _is_decoding_step(
        self,
        w: Tensor,
        u: Tensor,
        k: Tensor,
        v: Tensor,
        r: Tensor,
        weights: Tensor | None,
        state: Tensor | None,
    ) -> bool:
        """Whether one kernel can do all of it: few tokens, no gradient, and no receptance per perspective to merge."""
        if k.shape[1] > RECURRENT_MAX_T or not is_plain_inference(w, u, k, v, r, weights, state):
            return False
        is_merged_after = weights is not None and r.ndim == 4
        return not is_merged_after and resolve_backend(self.backend, k.device, k.dtype) == "triton"

    def extra_repr(self) -> str:
        return f"n_perspectives={self.n_perspectives}, perspective_vectors={self.perspective_vectors}"


def vector_shape(channels: int, n_perspectives: int, per_perspective: bool) -> tuple[int, ...]:
    return (n_perspectives, channels) if per_perspective and n_perspectives > 1 else (channels,)


def perspective_rows(value: Tensor, n_perspectives: int, noise: float) -> Tensor:
    """P copies of a vector [C] as rows [P, C]; rows 1 .. P-1 get Gaussian noise, row 0 stays as it is.

    The noise has the standard deviation `noise * rms(value)`: 0.1 is a tenth of the vector's own size.
    """
    rows = value.expand(n_perspectives, -1).clone()
    if noise > 0:
        rms = value.float().square().mean().sqrt()
        rows[1:] += (noise * rms * torch.randn_like(rows[1:], dtype=torch.float32)).to(rows.dtype)
    return rows


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
