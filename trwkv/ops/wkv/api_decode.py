"""Public functions for decoding, without a gradient: documentation and validation."""

from torch import Tensor

from trwkv.ops._dispatch import resolve_backend
from trwkv.ops._library import is_gradient_needed
from trwkv.ops._validate import require_same_device, require_shape, require_tensor
from trwkv.ops.wkv.api import WkvOutput, check_shapes, check_types, state_dtype, with_perspective_axis
from trwkv.ops.wkv.gated import wkv_gated
from trwkv.ops.wkv.in_place import wkv_recurrent_


def recurrent_wkv_(
    state: Tensor,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`recurrent_wkv` that replaces its state: returns the output, and `state` then holds the final state.

    On "triton" it is one launch that allocates nothing but the output and waits for nothing, so that a CUDA graph can
    hold it. On "torch" the state is computed apart and copied.

    Args:
        state: float32 [B, 3, P, C] (float64 for float64 k, v; [B, 3, C] where w is [C]), contiguous: changed in place.
            (0, 0, -1e38) along axis 1 is the state of a sequence's start.
        w, u, k, v, weights, backend: as in `multi_perspective_wkv`.

    Returns: output, as in `multi_perspective_wkv`.

    Raises: as `multi_perspective_wkv`; ValueError for a state that is not contiguous, RuntimeError
        where a gradient would be wanted: there is none.
    """
    _refuse_gradient(
        "recurrent_wkv_",
        "what it replaces a backward would need; use recurrent_wkv",
        state,
        w,
        u,
        k,
        v,
        weights,
    )
    check_types(w, u, k, v, weights, None, None)
    require_tensor("state", state, [state_dtype(k.dtype)])
    require_same_device(state=state, k=k)
    if not state.is_contiguous():
        raise ValueError(f"state: expected a contiguous tensor; got strides {list(state.stride())}")
    single = w.ndim == 1
    if single:
        require_shape("state", state, "[B, 3, C]", (*k.shape[:1], 3, w.shape[0]))
        w, u, weights, _ = with_perspective_axis(w, u, k, weights, None, None)
        state = state.unsqueeze(2)
    check_shapes(w, u, k, v, weights, None, None)
    require_shape("state", state, "[B, 3, P, C]", (k.shape[0], 3, *w.shape))
    output = wkv_recurrent_(state, w, u, k, v, weights, resolve_backend(backend, k.device, k.dtype))
    return output.squeeze(2) if single and weights is None else output


def gated_recurrent_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    receptance: Tensor,
    *,
    weights: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> WkvOutput:
    r"""`recurrent_wkv` times RWKV-4's gate: all of a decoding step between a layer's matrices, one launch on "triton".

    With y the output of `recurrent_wkv`, before it is rounded::

        output[t] = sigmoid(receptance[t]) y[t]

    RWKV: "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), equation 17, without its matrix.

    Args:
        receptance: before the sigmoid, of the output's shape: [B, T, C] where `weights` is given or w is [C], else
            [B, T, P, C]; any of the dtypes of k.
        w, u, k, v, weights, initial_state, backend: as in `multi_perspective_wkv`.

    Returns: WkvOutput(output, final_state), as `multi_perspective_wkv` with output_final_state=True.

    Made for few tokens: on "triton" they are computed one after the other, on "torch" by chunks.

    Raises: as `multi_perspective_wkv`; RuntimeError where a gradient would be wanted: there is none.
    """
    _refuse_gradient(
        "gated_recurrent_wkv", "use torch.sigmoid(receptance) * multi_perspective_wkv(...).output",
        w, u, k, v, receptance, weights, initial_state,
    )  # fmt: skip
    check_types(w, u, k, v, weights, initial_state, None)
    require_tensor("receptance", receptance)
    require_same_device(receptance=receptance, k=k)
    single = w.ndim == 1
    if single:
        w, u, weights, initial_state = with_perspective_axis(w, u, k, weights, initial_state, None)
    check_shapes(w, u, k, v, weights, initial_state, None)
    if single or weights is not None:
        require_shape("receptance", receptance, "[B, T, C]", (*k.shape[:2], w.shape[1]))
    else:
        require_shape("receptance", receptance, "[B, T, P, C]", (*k.shape[:2], *w.shape))
    if single and weights is None:
        receptance = receptance.unsqueeze(2)
    chosen = resolve_backend(backend, k.device, k.dtype)
    output, final_state = wkv_gated(w, u, k, v, receptance, weights, initial_state, chosen)
    if single:
        output = output.squeeze(2) if weights is None else output
        final_state = final_state.squeeze(2)
    return WkvOutput(output, final_state)


def _refuse_gradient(function: str, instead: str, *inputs: Tensor | None) -> None:
    if is_gradient_needed(*inputs):
        raise RuntimeError(
            f"{function}: expected no argument that requires a gradient, or torch.no_grad(): {instead}"
        )
