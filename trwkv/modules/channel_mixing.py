"""RWKV-4's channel mixing, its two time mixes one per perspective where asked."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trwkv.modules.arguments import check_bounds, check_input, check_whole_number, chosen_vectors
from trwkv.modules.linear import RwkvLinear
from trwkv.modules.time_mixing import perspective_rows, vector_shape
from trwkv.modules.token_shift import absent, last_token, shift_and_mix

CHANNEL_VECTORS = ("channel_mix_k", "channel_mix_r")


class ChannelMixingOutput(NamedTuple):
    """Output of `ChannelMixing`, and the state after the last token (None unless asked for)."""

    output: Tensor
    shift_state: Tensor | None


class ChannelMixing(nn.Module):
    r"""RWKV-4's channel mixing (arXiv 2305.13048, equations 14, 15, 18).

    With x' the previous token and mu the time mixes::

        k = W_k (mu_k x + (1 - mu_k) x')      r alike
        output = sigmoid(r) * W_v relu(k)^2

    Args:
        hidden_size: C.
        intermediate_size: channels of k; None is 4 C.
        n_perspectives: P. With P > 1 and x of shape [B, T, P, C] every stream goes through the same matrices.
        perspective_vectors: which of `CHANNEL_VECTORS` (the time mixes of k and r) have one row per
            perspective.
        perspective_noise: as in `TimeMixing`.
        layer_index, n_layers: place in the model, for the initial values.
        backend: of `trwkv.ops.token_shift_mix`.

    Raises:
        ValueError: an unknown vector, P < 1.
    """

    time_mix_k: nn.Parameter
    time_mix_r: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None = None,
        *,
        n_perspectives: int = 1,
        perspective_vectors: Sequence[str] = (),
        perspective_noise: float = 0.0,
        layer_index: int = 0,
        n_layers: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_whole_number("n_perspectives", n_perspectives)
        perspective_vectors = chosen_vectors(perspective_vectors, CHANNEL_VECTORS)
        intermediate_size = intermediate_size or 4 * hidden_size
        self.hidden_size = hidden_size
        self.n_perspectives = n_perspectives
        self.perspective_vectors = tuple(perspective_vectors)
        self.perspective_noise = perspective_noise
        self.layer_index, self.n_layers = layer_index, n_layers
        self.backend = backend
        for name in CHANNEL_VECTORS:
            shape = vector_shape(hidden_size, n_perspectives, name in perspective_vectors)
            self.register_parameter(name.replace("channel", "time"), nn.Parameter(torch.empty(shape)))
        self.key = RwkvLinear(hidden_size, intermediate_size)
        self.receptance = RwkvLinear(hidden_size, hidden_size, scale=0)
        self.value = RwkvLinear(intermediate_size, hidden_size, scale=0)
        self.reset_parameters()

    def initial_values(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each vector with the value it starts from: RWKV-4's curve, rows but the first with
        `perspective_noise`."""
        height = 1 - self.layer_index / self.n_layers
        position = torch.arange(self.key.in_features, dtype=torch.float32) / self.key.in_features
        for parameter in (self.time_mix_k, self.time_mix_r):
            value = position**height
            if parameter.ndim == 2:
                value = perspective_rows(value, self.n_perspectives, self.perspective_noise)
            yield parameter, value.to(parameter)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The vectors on their curves (the matrices look after themselves: key orthogonal, the others zero)."""
        for parameter, value in self.initial_values():
            parameter.copy_(value)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        shift_state: Tensor | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
        scale: float = 1.0,
    ) -> ChannelMixingOutput:
        """Mix over channels; arguments as in `TimeMixing.forward`.

        x is [B, T, C] or [B, T, P, C] for any P; with `perspective_vectors` and P > 1 [B, T, P, C], of that P.

        Raises:
            TypeError, ValueError: as there.
        """
        is_streams = self.n_perspectives > 1 and len(self.perspective_vectors) > 0
        n_streams = self.n_perspectives if is_streams else x.shape[2] if x.ndim == 4 else None
        check_input(x, self.hidden_size, n_streams, mask=mask, shift_state=shift_state, cu_seqlens=cu_seqlens)
        if cu_seqlens is not None:
            check_bounds(cu_seqlens, x.shape[1])
        if mask is not None:
            x = x.masked_fill(absent(mask, x.ndim), 0)
        mixes = self.time_mix_k, self.time_mix_r
        for_k, for_r = shift_and_mix(x, mixes, shift_state, cu_seqlens, self.backend)
        k = torch.relu(self.key(for_k)).square()
        if scale != 1.0:
            k = scale * k
        r = torch.sigmoid(self.receptance(for_r))
        shift_state = last_token(x, shift_state, cu_seqlens) if output_state else None
        return ChannelMixingOutput(r * self.value(k), shift_state)

    def extra_repr(self) -> str:
        return f"n_perspectives={self.n_perspectives}, perspective_vectors={self.perspective_vectors}"
