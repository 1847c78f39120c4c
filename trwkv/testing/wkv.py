"""The WKV under contract: its cases, its truth in float64 with conditions, and its error bound."""

import torch
from torch import Tensor

from trwkv.ops import chunk_wkv, recurrent_wkv, reference_wkv
from trwkv.ops._tuning import CONFIGS
from trwkv.ops.wkv.reference import EMPTY_EXP, aggregate, step_wkv
from trwkv.testing.cases import LAYOUTS, Axes, Case, laid_out
from trwkv.testing.ops import Implementation, Named, OpContract, Run, evaluate, forward, register, truth_of
from trwkv.testing.tolerances import VANISHED, Truth, visible

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TINY = 1e-300
WEIGHT_ROUNDINGS = 24  # in half-ulps: of a token's weight, by any backend, whatever its age
SUM_ROUNDINGS = (
    6  # of a term on its way into the sums and out of them, and one or two more for each step since
)


def wkv_case(
    B: int,
    T: int,
    P: int,
    C: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    mixed_dtypes: bool = False,
    shared: bool = True,
    weights: str = "none",
    state: str = "none",
    final_gradient: bool = True,
    k_range: float = 4.0,
    u_range: float = 1.0,
    log_decays: tuple[float, float] = (-6.0, 1.5),
    growing: float = 0.0,
    layout: str = "contiguous",
    cu_seqlens: tuple[int, ...] | None = None,
    reverse: bool = False,
) -> Case:
    """Random inputs. `weights` is "none", "P", "PC" or "BTP"; `state` "none", "zero" or "random".

    k is uniform in +-k_range, u in +-u_range, and log|w| in `log_decays` (|w| from 1e-6 to 80: (-13.8, 4.4)); the share
    `growing` of the decays is positive. `dtype` is that of k, v, weights and the output's gradient; with `mixed_dtypes`
    that of k, and the others have types of their own. `layout` is one of `LAYOUTS`, for every input; "expanded" also
    makes incoming gradients that of a sum: all ones.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g)

    narrow = torch.float32 if dtype != torch.float64 else torch.float64
    shape = (B, T, C) if shared else (B, T, P, C)
    sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    w = -torch.exp(uniform(P, C, low=log_decays[0], high=log_decays[1]))
    u = u_range * uniform(P, C)
    k = k_range * uniform(*shape)
    v = torch.randn(*shape, generator=g)
    shapes = {"P": (P,), "PC": (P, C), "BTP": (B, T, P)}
    aggregation = None if weights == "none" else uniform(*shapes[weights])
    initial = _initial_state(
        g, state, (sequences, 3, P, C), k_range, max(k_range, u_range) > 10 or growing > 0
    )
    grad_output = torch.randn(*((B, T, P, C) if aggregation is None else (B, T, C)), generator=g)
    grad_state = torch.randn(sequences, 2, P, C, generator=g)
    w = torch.where(torch.rand(P, C, generator=g) < growing, -w, w)

    types = dict.fromkeys(("k", "v", "weights"), dtype) | dict.fromkeys(("w", "u"), narrow)
    if mixed_dtypes and dtype in FLOATS:
        at = FLOATS.index(dtype)
        types |= {"v": FLOATS[at - 1], "weights": FLOATS[at - 2], "w": torch.bfloat16, "u": torch.bfloat16}
    drawn = {"w": w, "u": u, "k": k, "v": v, "weights": aggregation, "initial_state": initial}
    inputs = {name: x.to(types.get(name, narrow)) for name, x in drawn.items() if x is not None}
    grads = {"output": grad_output.to(types["v"])}
    if final_gradient:
        grads["state"] = grad_state.to(narrow)
    if layout == "expanded":
        grads = {name: torch.ones((), dtype=x.dtype).expand(x.shape) for name, x in grads.items()}
    inputs = {name: laid_out(x, layout, seed + i) for i, (name, x) in enumerate(inputs.items())}
    bounds = (
        None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=(torch.int64, torch.int32)[seed % 2])
    )
    return Case(inputs, grads, _axes(weights), bounds, reverse)


def _initial_state(
    g: torch.Generator, kind: str, shape: tuple[int, ...], k_range: float, is_wild: bool
) -> Tensor | None:
    if kind == "none":
        return None
    initial = torch.randn(*shape, generator=g)
    initial[:, 1] = initial[:, 1].abs() + 0.1
    initial[:, 2] *= k_range
    if kind == "zero":
        initial[:, :2] = 0.0
        if is_wild:  # the derivative by an absent state of finite exponent can overflow
            initial[:, 2] = EMPTY_EXP
    return initial


def _axes(weights: str) -> dict[str, Axes]:
    per_token, vector, state = Axes(0, 1, -1), Axes(lane=-1), Axes(batch=0, lane=-1)
    of_weights = {"PC": vector, "BTP": Axes(0, 1)}.get(weights, Axes())
    return {
        "w": vector, "u": vector, "k": per_token, "v": per_token, "weights": of_weights, "initial_state": state,
        "output": per_token, "state": state,
    }  # fmt: skip


def true_sums(state: Tensor, exponent: Tensor) -> Tensor:
    """(num, den) of a state in units of e^exponent, float64: comparable between states of any representation.

    State [B, 3, ...], exponent [B, ...] or [B, 1, ...]. An empty state is in any unit.
    """
    num, den, exp = state.double().unbind(1)
    scale = torch.exp((exp.detach() - exponent.reshape(exp.shape)).clamp(max=700.0))
    scale = torch.where((num == 0) & (den == 0), 1.0, scale)
    return torch.stack([num * scale, den * scale], dim=1)


def exponents(result: tuple[Tensor, Tensor]) -> Named:
    return {"state": result[1][:, 2:].double()}


def comparable(result: tuple[Tensor, Tensor], units: Named) -> Named:
    return {"output": result[0], "state": true_sums(result[1], units["state"])}


def dense_truth(case: Case, backward: bool = True) -> Truth:
    """By the step loop, with conditions: the sum of the magnitudes of the terms of each result, or a close bound."""

    def reference(c: Case) -> tuple[Tensor, Tensor]:
        return step_wkv(c.w, c.u, c.k, c.v, c.weights, c.initial_state)

    results = evaluate(OP, case, reference) if backward else forward(case, reference)
    scale = exponents((results["output"], results["state"]))
    values = results | comparable((results["output"], results["state"]), scale)
    size = _largest_value(case)
    conditions = _forward_conditions(case, size, values["state"])
    if backward:
        conditions |= _gradient_conditions(case, size, values["state"])
    values = {name: values[name] for name in conditions}
    return Truth(values, {name: x.expand(values[name].shape) for name, x in conditions.items()}, scale)


def shares(case: Case) -> Tensor:
    """What each token, and first the initial state, weighs in each y: [B, T + 1, 1 + T, P, C], row T the final state.

    A direct softmax in float64 of a case of rows, run forwards; independent of both oracles.
    """
    w, u, k = case.w.double(), case.u.double(), _per_perspective(case.k).double()
    B, T = k.shape[:2]
    t = torch.arange(T + 1)
    lag = (t[:, None] - 1 - t[None, :T])[..., None, None]
    own = (lag == -1) & (t[:, None, None, None] < T)
    logits = torch.where(own, u, lag * w) + k[:, None]
    logits = torch.where(own | (lag >= 0), logits, float("-inf"))
    start = torch.full((B, *w.shape), float("-inf"), dtype=torch.float64)
    if case.initial_state is not None:
        _, den, exp = case.initial_state.double().unbind(1)
        start = torch.where(den > 0, den.clamp(min=TINY).log() + exp, float("-inf"))
    start = start[:, None] + t[:, None, None] * w
    everything = torch.cat([start[:, :, None], logits.expand(B, T + 1, T, *w.shape)], dim=2)
    return torch.softmax(everything, dim=2).nan_to_num(0.0)


def _per_perspective(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.ndim == 3 else x


def _largest_value(case: Case) -> Tensor:
    """[P, C]: the largest value there is to average."""
    size = torch.full(case.w.shape, TINY, dtype=torch.float64)
    if case.tokens:
        size = torch.maximum(size, _per_perspective(case.v).abs().amax((0, 1)))
    if case.initial_state is not None:
        num, den, _ = case.initial_state.unbind(1)
        size = torch.maximum(size, (num / den.clamp(min=TINY)).nan_to_num(0.0).abs().amax(0))
    return size


def _forward_conditions(case: Case, size: Tensor, state: Tensor) -> Named:
    y_size = size.expand(*case.k.shape[:2], *size.shape)
    output = y_size if case.weights is None else aggregate(y_size, case.weights.abs())
    return {"output": output, "state": torch.stack([state[:, 1] * size, state[:, 1]], dim=1)}


def _gradient_conditions(case: Case, size: Tensor, state: Tensor) -> Named:
    share, spread = shares(case), 2 * size
    T = case.tokens
    g, g_y = _incoming(case)
    g_rows = torch.cat([g_y, torch.zeros_like(size).expand(g_y.shape[0], 1, *size.shape)], dim=1)
    if "state" in case.grads:  # the final sums as one more row, with derivatives by log weight of its own
        g_num, g_den = case.grad_state.abs().unbind(1)
        g_rows[:, -1] = g_num * state[:, 1].abs() + g_den * state[:, 1].abs() / size
    received = torch.einsum("btipc,btpc->bipc", share, g_rows)  # by the initial state and by every token
    lag = torch.arange(T + 1)[:, None] - torch.arange(T + 1)[None]
    lags = torch.einsum("btipc,ti->btpc", share, lag.clamp(min=0).double())
    own = torch.diagonal(share[:, :T, 1:], dim1=1, dim2=2).permute(0, 3, 1, 2)  # [B, T, P, C]
    total, total_spread = received, received * spread
    if case.k.ndim == 3:
        total, total_spread = total.sum(2), total_spread.sum(2)
    conditions = {
        "v": visible(total, 1)[:, 1:],
        "k": visible(total_spread, 1)[:, 1:],
        "w": (g_rows * lags.clamp(min=VANISHED) * spread).sum((0, 1)),
        "u": (g_y * own * spread).sum((0, 1)),
    }
    if case.weights is not None:
        reduced = {1: (0, 1, 3), 2: (0, 1), 3: (3,)}[case.weights.ndim]
        conditions["weights"] = (g * size).expand(g_y.shape).sum(reduced)
    if case.initial_state is not None:
        conditions["initial_state"] = _initial_condition(case, g_rows, size)
    return conditions


def _incoming(case: Case) -> tuple[Tensor, Tensor]:
    """Magnitudes of the gradients: that of the output, broadcastable to [B, T, P, C], and those that reach each y."""
    shape = (*case.k.shape[:2], *case.w.shape)
    if "output" not in case.grads:
        return (torch.zeros(shape, dtype=torch.float64),) * 2
    g = _per_perspective(case.grad_output).abs()
    if case.weights is None:
        return g, g
    weights = case.weights.abs()
    return g, (g * (weights if weights.ndim == 2 else weights[..., None])).expand(shape)


def _initial_condition(case: Case, g_rows: Tensor, size: Tensor) -> Tensor:
    """By the state's true sums: what a state of den = 1 and the same exponent would weigh, over the true weight."""
    num, den, exp = case.initial_state.unbind(1)
    lacking = (den == 0) & (num == 0)
    probe = torch.stack([num, torch.where(lacking, 1.0, den), torch.where(lacking, exp - 100.0, exp)], dim=1)
    probing = Case(case.inputs | {"initial_state": probe}, {}, case.axes)
    by_num = (shares(probing)[:, :, 0] * g_rows).sum(1) / probe[:, 1]
    by_num = torch.where(lacking, by_num * torch.exp(torch.tensor(100.0, dtype=torch.float64)), by_num)
    by_den = by_num * 2 * size
    return torch.stack([by_num, by_den, num.abs() * by_num + den.abs() * by_den], dim=1)


def wkv_truth(case: Case) -> Truth:
    """Float64 results of a WKV case and their conditions."""
    return truth_of(OP, case)


def gradients(case: Case, run: Run, exponent: Tensor) -> Named:
    """Gradients of `case`'s inputs under `run(case) -> (output, final_state)`, the state's in units of e^exponent."""
    results = evaluate(OP, case, run, {"state": exponent.unsqueeze(1)})
    return {name: results[name] for name in case.inputs}


def error_bound(case: Case) -> Tensor:
    """Of every y in float32, from the roundings that MATH.md (section 4) counts; without that of y itself.

    An error of a weight is common to numerator and denominator and moves y towards or away from its value; those of the
    two sums are not, and grow with a token's age.
    """
    share = shares(case)[:, :-1]  # [B, T, 1 + T, P, C]
    v = _per_perspective(case.v).expand(*case.k.shape[:2], *case.w.shape)
    first = torch.zeros_like(v[:, :1])
    if case.initial_state is not None:
        num, den, _ = case.initial_state.unbind(1)
        first = (num / den.clamp(min=TINY)).nan_to_num(0.0).unsqueeze(1)
    values = torch.cat([first, v], dim=1).unsqueeze(1)  # [B, 1, 1 + T, P, C]
    y = (share * values).sum(2, keepdim=True)
    t = torch.arange(case.tokens)
    age = (t[:, None] + 1 - torch.arange(case.tokens + 1)).clamp(min=0)
    sums = (SUM_ROUNDINGS + age + age.clamp(max=16))[None, :, :, None, None]
    terms = WEIGHT_ROUNDINGS * (values - y).abs() + sums * (values.abs() + y.abs())
    return 2.0**-24 * (share * terms).sum(2)


def block_sizes() -> list[dict[str, int]]:
    """Every configuration that ships, once."""
    sizes = [{name: n for name, n in vars(config).items() if n is not None} for config in CONFIGS.values()]
    return [x for i, x in enumerate(sizes) if x not in sizes[:i]]


OP = OpContract(
    name="wkv",
    case=wkv_case,
    choices={
        "P": range(1, 6),
        "C": (1, 3, 16, 19, 35),
        "mixed_dtypes": (False, True),
        "shared": (True, False),
        "weights": ("none", "P", "PC", "BTP"),
        "state": ("none", "random", "zero"),
        "final_gradient": (False, True),
        "layout": LAYOUTS,
    },
    complete={"weights": "BTP", "state": "random"},
    adversarial={
        "k_range": (4.0, 0.0, 40.0, 300.0),
        "u_range": (1.0, 0.0, 30.0, 300.0),
        "log_decays": ((-6.0, 1.5), (-13.8, 4.4), (-13.8, -8.0), (3.0, 4.4)),
        "growing": (0.0, 0.5, 1.0),
    },
    dense_truth=dense_truth,
    units=exponents,
    comparable=comparable,
    result_dtype=lambda case: case.v.dtype,
    error_bound=error_bound,
    configurations=block_sizes(),
)

register(
    Implementation(OP, "reference", reference_wkv, is_token_loop=True),
    Implementation(OP, "torch-chunk", chunk_wkv, "torch"),
    Implementation(OP, "torch-recurrent", recurrent_wkv, "torch", is_token_loop=True),
    Implementation(OP, "triton-chunk", chunk_wkv, "triton"),
    Implementation(OP, "triton-recurrent", recurrent_wkv, "triton"),
)
