"""Public functions of the op: documentation, validation, and the P axis of the single-perspective form."""

from typing import NamedTuple

import torch
from torch import Tensor

from trwkv.ops._dispatch import resolve_backend
from trwkv.ops._validate import (
    require_cu_seqlens,
    require_flag,
    require_same_device,
    require_shape,
    require_tensor,
    sequence_bounds,
)
from trwkv.ops.wkv import reference
from trwkv.ops.wkv.autograd import wkv
from trwkv.ops.wkv.states import merge_states
from trwkv.ops.wkv.states import wkv_states as wkv_states_op


class WkvOutput(NamedTuple):
    """Result of the op. `final_state` is None unless it was asked for."""

    output: Tensor
    final_state: Tensor | None


class WkvStates(NamedTuple):
    """Result of `wkv_states`. `final_state` is None unless it was asked for."""

    states: Tensor
    final_state: Tensor | None


def multi_perspective_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> WkvOutput:
    r"""RWKV-4's WKV under P temporal perspectives, each with its own decay and bonus, in one pass over k and v.

    For batch b, channel c and perspective p::

        y[t,p] = ( sum_{i<t} exp((t-1-i) w[p] + k[i]) v[i] + exp(u[p] + k[t]) v[t] )
               / ( sum_{i<t} exp((t-1-i) w[p] + k[i])      + exp(u[p] + k[t])      )

        output[t] = sum_p weights[t,p] y[t,p]                   (when `weights` is given)

    RWKV: "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), equation 16; perspectives: "Multiple
    temporal perspectives" (arXiv 2402.02625).

    Args:
        w: log decay per step, [P, C], any finite value; RWKV-4's is `-exp(time_decay)` <= 0. [C] means P = 1, and
            then the P axis is absent from output, state and weights as well.
        u: bonus of the current token, a log weight like k, same shape as w (RWKV-4: `time_first`).
        k: log weight of each token, [B, T, C] shared by the perspectives (read once: the fast case) or
            [B, T, P, C], one per perspective.
        v: value of each token, same shape as k.
        weights: None for separate outputs, or [P], [P, C] or [B, T, P] to sum the perspectives with these weights
            (they need not sum to one).
        initial_state: state before the first token, float32 [B, 3, P, C] = (num, den, exp), standing for the sums
            `num * e^exp` of the numerator and `den * e^exp` of the denominator (natural log, den >= 0).
            None is a fresh state, as is one whose num and den are all zero. [N, 3, P, C] with cu_seqlens.
        output_final_state: return the state after the last token, to continue from.
        cu_seqlens: packed sequences of different lengths: [N + 1] int32 or int64, rising from 0 to T. Sequence n is
            tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1 of the one row of k and v (B = 1), computed as if it were
            alone; it may be empty. On k's device or on the CPU. Its values are checked: on a GPU the tensor is
            read once, at its first use (a wait for the device), and again when PyTorch has changed it in place (of what
            a replayed CUDA graph writes nobody is told).
        reverse: run from the last token of each sequence to its first. y[t] then sums over i > t, with decays
            (i-1-t) w; initial_state comes before the last token, final_state after the first.
        backend: "auto" (Triton on a GPU where the package is installed, PyTorch elsewhere and for float64), "triton"
            (at most 8 perspectives; "auto" on a GPU does not turn to PyTorch for more), "torch" or "reference".

    Returns:
        WkvOutput(output, final_state). output is [B, T, P, C], or [B, T, C] when `weights` is given, in v's dtype.
        final_state is [B, 3, P, C] ([N, 3, P, C] with cu_seqlens) or None. Without a token (T = 0, or a packed sequence
        that is empty) the final state is a copy of the initial one, or a fresh one.

    Range: any finite w (positive, growing ones too), u, k, v are computed to float32 accuracy; on "triton" |k|, |exp|
    and T w up to 8e6, beyond which k is clamped, and |v| up to 1e37. NaN and infinities spread within their sequence
    and channel alone.

    Types: k, v, w, u and weights in float32, bfloat16 or float16, mixed as you like; arithmetic and state are
    float32. float64 k and v (both or neither) compute in float64, on "torch" and "reference"; the state is then
    float64 too. The "reference" always computes in float64 and rounds once.

    Gradients reach w, u, k, v, weights and initial_state, each in its own dtype, from the output and from num and
    den of the final state. The final state's exp is a constant chosen by the implementation: it carries no gradient.
    Second order is available on "reference" alone; elsewhere it raises.

    Raises:
        TypeError: an argument that is not a tensor, or of a dtype not listed or not for this backend.
        ValueError: shapes that do not fit each other, tensors on different devices, a backend that cannot run here, or
            more perspectives than it takes.
    """
    return _run(w, u, k, v, weights, initial_state, output_final_state, cu_seqlens, reverse, backend, "auto")


def chunk_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> WkvOutput:
    """`multi_perspective_wkv`, always by chunks, whatever T: the form made for training and prefill."""
    return _run(w, u, k, v, weights, initial_state, output_final_state, cu_seqlens, reverse, backend, "chunk")


def recurrent_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> WkvOutput:
    """`multi_perspective_wkv`, always token by token: on "triton" one launch, the form made for decoding.

    On "torch" it is a float64 loop, there to compare with; for decoding on a CPU use `multi_perspective_wkv`.
    """
    return _run(
        w, u, k, v, weights, initial_state, output_final_state, cu_seqlens, reverse, backend, "recurrent"
    )


def reference_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> WkvOutput:
    """`multi_perspective_wkv` as a plain float64 loop over the tokens: slow, differentiable to any order."""
    return _run(
        w, u, k, v, weights, initial_state, output_final_state, cu_seqlens, reverse, "reference", "recurrent"
    )


def wkv_states(
    w: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> WkvStates:
    r"""The WKV's sums themselves, unnormalised: the state that every token sees, to build other ops from.

    For batch b, channel c and perspective p, with initial sums (num0, den0)::

        num[t,p] = sum_{i<t} exp((t-1-i) w[p] + k[i]) v[i] + exp(t w[p]) num0
        den[t,p] = sum_{i<t} exp((t-1-i) w[p] + k[i])      + exp(t w[p]) den0

    each given as a mantissa and a common exponent. A bidirectional WKV ("Vision-RWKV", arXiv 2403.02308, equation 5,
    with its decay divided by T) is a state from the left, one from the right and the token itself, added::

        left = wkv_states(w, k, v).states
        right = wkv_states(w, k, v, reverse=True).states
        k, v = (x.unsqueeze(2).expand(-1, -1, P, -1) for x in (k, v))  # [B, T, P, C]
        own = torch.stack([v, torch.ones_like(v), u + k], dim=1)
        num, den, _ = merge_wkv_states(left, right, own).unbind(1)
        y = num / den                                                  # [B, T, P, C]

    Args: as in `multi_perspective_wkv`; no bonus and no weights, which belong to what is made of the sums.

    Returns:
        WkvStates(states, final_state). states is [B, 3, T, P, C] = (num, den, exp) along axis 1, standing for the sums
        `num * e^exp` and `den * e^exp`, in float32 (float64 for float64 k, v); [B, 3, T, C] where w is [C]. With
        reverse the sums are those over i > t. final_state as in `multi_perspective_wkv`.

    Gradients reach w, k, v and initial_state from num and den; exp is a constant chosen by the implementation. The
    gradient of this op is the op itself, run the other way, so that it can be derived again.

    It writes 3 P numbers per token and channel, and the Triton kernel takes its exact path throughout: where normalised
    outputs will do, `multi_perspective_wkv` is several times faster.

    Raises: as `multi_perspective_wkv`.
    """
    check_types(w, w, k, v, None, initial_state, cu_seqlens)
    require_flag("output_final_state", output_final_state)
    require_flag("reverse", reverse)
    single = w.ndim == 1
    if single:
        w, _, _, initial_state = with_perspective_axis(w, w, k, None, initial_state, cu_seqlens)
    check_shapes(w, w, k, v, None, initial_state, cu_seqlens)
    chosen = resolve_backend(backend, k.device, k.dtype)
    if chosen == "reference":
        bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, k.shape[1])
        states, final_state = reference.step_states(w, k, v, initial_state, bounds, reverse)
    else:
        states, final_state = wkv_states_op(w, k, v, initial_state, cu_seqlens, reverse, chosen)
    if single:
        states, final_state = states.squeeze(3), final_state.squeeze(2)
    return WkvStates(states, final_state if output_final_state else None)


def merge_wkv_states(*states: Tensor) -> Tensor:
    """The state whose sums are those of all `states` added: what two stretches of tokens hold together.

    Args:
        states: any number of tensors of one shape, (num, den, exp) along axis 1, standing for the sums `num * e^exp`
            and `den * e^exp`: states of tokens [B, 3, T, P, C], of sequences [B, 3, P, C], or made by hand (num = v,
            den = 1, exp = k is a single token). float32 or float64, all alike.

    Returns a state of the same shape and dtype, in units of the largest; (0, 0, -1e38) where all are empty. Gradients
    reach num, den and exp of every input, through num and den of the result; its exp is a constant.

    Raises:
        TypeError: no tensor, something else than a tensor, or different dtypes.
        ValueError: shapes that differ or whose axis 1 is not 3, or tensors on different devices.
    """
    if not states:
        raise TypeError("states: expected at least one tensor; got none")
    named = {f"states[{i}]": x for i, x in enumerate(states)}
    for name, x in named.items():
        require_tensor(name, x, [torch.float32, torch.float64])
        if x.ndim < 3 or x.shape[1] != 3:
            raise ValueError(f"{name}: expected shape [B, 3, ...]; got {list(x.shape)}")
        require_shape(name, x, "that of states[0]", states[0].shape)
        if x.dtype != states[0].dtype:
            raise TypeError(f"{name}: expected the dtype of states[0], {states[0].dtype}; got {x.dtype}")
    require_same_device(**named)
    return merge_states(states)


def _run(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    reverse: bool,
    backend: str,
    algorithm: str,
) -> WkvOutput:
    check_types(w, u, k, v, weights, initial_state, cu_seqlens)
    require_flag("output_final_state", output_final_state)
    require_flag("reverse", reverse)
    single = w.ndim == 1
    if single:
        w, u, weights, initial_state = with_perspective_axis(w, u, k, weights, initial_state, cu_seqlens)
    check_shapes(w, u, k, v, weights, initial_state, cu_seqlens)
    chosen = resolve_backend(backend, k.device, k.dtype)
    if chosen == "reference":
        bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, k.shape[1])
        output, final_state = reference.step_wkv(w, u, k, v, weights, initial_state, bounds, reverse)
    else:
        output, final_state = wkv(w, u, k, v, weights, initial_state, cu_seqlens, reverse, chosen, algorithm)
    if single:
        output = output.squeeze(2) if weights is None else output
        final_state = final_state.squeeze(2)
    return WkvOutput(output, final_state if output_final_state else None)


def check_types(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, x in (("w", w), ("u", u), ("k", k), ("v", v)):
        require_tensor(name, x)
    if (k.dtype == torch.float64) != (v.dtype == torch.float64):
        raise TypeError(f"k, v: expected both or neither in float64; got {k.dtype} and {v.dtype}")
    if weights is not None:
        require_tensor("weights", weights)
    if initial_state is not None:
        require_tensor("initial_state", initial_state, [state_dtype(k.dtype)])
    require_same_device(w=w, u=u, k=k, v=v, weights=weights, initial_state=initial_state)
    if cu_seqlens is not None:
        require_cu_seqlens(cu_seqlens, k.device)


def with_perspective_axis(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The form for w of shape [C], with P = 1 made explicit."""
    require_shape("u", u, "[C], as w", w.shape)
    if k.ndim != 3:
        raise ValueError(f"k: expected shape [B, T, C] with w of shape [C]; got {list(k.shape)}")
    if weights is not None:
        if weights.ndim > 2:
            raise ValueError(
                f"weights: expected shape [], [C] or [B, T] with w of shape [C]; got {list(weights.shape)}"
            )
        weights = weights.unsqueeze(-1 if weights.ndim == 2 else 0)
    if initial_state is not None:
        N, spec = _sequence_axis(k, cu_seqlens)
        require_shape("initial_state", initial_state, f"[{spec}, 3, C]", (N, 3, w.shape[0]))
        initial_state = initial_state.unsqueeze(2)
    return w.unsqueeze(0), u.unsqueeze(0), weights, initial_state


def check_shapes(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"w: expected shape [P, C] or [C], P and C at least 1; got {list(w.shape)}")
    P, C = w.shape
    require_shape("u", u, "[P, C], as w", (P, C))
    if k.ndim not in (3, 4):
        raise ValueError(f"k: expected shape [B, T, C] or [B, T, P, C]; got {list(k.shape)}")
    B, T = k.shape[:2]
    if k.ndim == 3:
        require_shape("k", k, "[B, T, C]", (B, T, C))
    else:
        require_shape("k", k, "[B, T, P, C]", (B, T, P, C))
    require_shape("v", v, "that of k", k.shape)
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"k: expected B = 1 with cu_seqlens; got shape {list(k.shape)}")
    if weights is not None:
        valid = {1: ("[P]", (P,)), 2: ("[P, C]", (P, C)), 3: ("[B, T, P]", (B, T, P))}
        if weights.ndim not in valid:
            raise ValueError(
                f"weights: expected shape [P], [P, C] or [B, T, P] with P = {P}; got {list(weights.shape)}"
            )
        require_shape("weights", weights, *valid[weights.ndim])
    if initial_state is not None:
        N, spec = _sequence_axis(k, cu_seqlens)
        require_shape("initial_state", initial_state, f"[{spec}, 3, P, C]", (N, 3, P, C))


def _sequence_axis(k: Tensor, cu_seqlens: Tensor | None) -> tuple[int, str]:
    """How many sequences there are, and the letter for it."""
    if cu_seqlens is None:
        return k.shape[0], "B"
    return cu_seqlens.shape[0] - 1, "N"


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
