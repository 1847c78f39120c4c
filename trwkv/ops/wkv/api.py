"""Public functions of the op: documentation, validation, and the P axis of the single-perspective form."""

from typing import NamedTuple

import torch
from torch import Tensor

from trwkv.ops._dispatch import resolve_backend
from trwkv.ops._validate import require_flag, require_same_device, require_shape, require_tensor
from trwkv.ops.wkv import reference
from trwkv.ops.wkv.autograd import wkv


class WkvOutput(NamedTuple):
    """Result of the op. `final_state` is None unless it was asked for."""

    output: Tensor
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
            None is a fresh state, as is one whose num and den are all zero.
        output_final_state: return the state after the last token, to continue from.
        backend: "auto" (Triton on a GPU where the package is installed, PyTorch elsewhere and for float64), "triton"
            (at most 8 perspectives; "auto" on a GPU does not turn to PyTorch for more), "torch" or "reference".

    Returns:
        WkvOutput(output, final_state). output is [B, T, P, C], or [B, T, C] when `weights` is given, in v's dtype.
        final_state is [B, 3, P, C] or None. T = 0 gives an empty output and a final state equal to the initial one.

    Range: any finite w, u, k, v are computed to float32 accuracy; on "triton" |k| and |exp| up to 8e6, beyond which k
    is clamped. NaN and infinities spread within their batch row and channel alone.

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
    return _run(w, u, k, v, weights, initial_state, output_final_state, backend, "auto")


def chunk_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> WkvOutput:
    """`multi_perspective_wkv`, always by chunks, whatever T: the form made for training and prefill."""
    return _run(w, u, k, v, weights, initial_state, output_final_state, backend, "chunk")


def recurrent_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> WkvOutput:
    """`multi_perspective_wkv`, always token by token: on "triton" one launch, the form made for decoding.

    On "torch" it is a float64 loop, there to compare with; for decoding on a CPU use `multi_perspective_wkv`.
    """
    return _run(w, u, k, v, weights, initial_state, output_final_state, backend, "recurrent")


def reference_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> WkvOutput:
    """`multi_perspective_wkv` as a plain float64 loop over the tokens: slow, differentiable to any order."""
    return _run(w, u, k, v, weights, initial_state, output_final_state, "reference", "recurrent")


def _run(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    backend: str,
    algorithm: str,
) -> WkvOutput:
    _check_types(w, u, k, v, weights, initial_state)
    require_flag("output_final_state", output_final_state)
    single = w.ndim == 1
    if single:
        w, u, weights, initial_state = _with_perspective_axis(w, u, k, weights, initial_state)
    _check_shapes(w, u, k, v, weights, initial_state)
    chosen = resolve_backend(backend, k.device, k.dtype)
    if chosen == "reference":
        output, final_state = reference.step_wkv(w, u, k, v, weights, initial_state)
    else:
        output, final_state = wkv(w, u, k, v, weights, initial_state, chosen, algorithm)
    if single:
        output = output.squeeze(2) if weights is None else output
        final_state = final_state.squeeze(2)
    return WkvOutput(output, final_state if output_final_state else None)


def _check_types(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, initial_state: Tensor | None
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


def _with_perspective_axis(
    w: Tensor, u: Tensor, k: Tensor, weights: Tensor | None, initial_state: Tensor | None
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
        require_shape("initial_state", initial_state, "[B, 3, C]", (k.shape[0], 3, w.shape[0]))
        initial_state = initial_state.unsqueeze(2)
    return w.unsqueeze(0), u.unsqueeze(0), weights, initial_state


def _check_shapes(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, initial_state: Tensor | None
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
    if weights is not None:
        valid = {1: ("[P]", (P,)), 2: ("[P, C]", (P, C)), 3: ("[B, T, P]", (B, T, P))}
        if weights.ndim not in valid:
            raise ValueError(
                f"weights: expected shape [P], [P, C] or [B, T, P] with P = {P}; got {list(weights.shape)}"
            )
        require_shape("weights", weights, *valid[weights.ndim])
    if initial_state is not None:
        require_shape("initial_state", initial_state, "[B, 3, P, C]", (B, 3, P, C))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
