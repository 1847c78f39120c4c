"""The WKV's unnormalised sums under contract: (num, den, exp) at every token."""

import torch
from torch import Tensor

from trwkv.ops import wkv_states
from trwkv.ops.wkv.reference import step_states
from trwkv.testing.cases import LAYOUTS, Axes, Case
from trwkv.testing.ops import Implementation, Named, OpContract, evaluate, forward, register
from trwkv.testing.tolerances import Truth, visible
from trwkv.testing.wkv import block_sizes, true_sums, wkv_case


def wkv_states_case(
    B: int,
    T: int,
    P: int,
    C: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    mixed_dtypes: bool = False,
    shared: bool = True,
    state: str = "none",
    final_gradient: bool = True,
    k_range: float = 4.0,
    log_decays: tuple[float, float] = (-6.0, 1.5),
    growing: float = 0.0,
    layout: str = "contiguous",
    cu_seqlens: tuple[int, ...] | None = None,
    reverse: bool = False,
) -> Case:
    """Random inputs, as `wkv_case` draws them. The incoming gradients are those of the true sums (num, den)."""
    case = wkv_case(
        B, T, P, C, seed=seed, dtype=dtype, mixed_dtypes=mixed_dtypes, shared=shared, state=state,
        final_gradient=final_gradient, k_range=k_range, log_decays=log_decays, growing=growing, layout=layout,
        cu_seqlens=cu_seqlens, reverse=reverse,
    )  # fmt: skip
    del case.inputs["u"]
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    g = torch.Generator().manual_seed(seed + 1)
    grad = torch.randn(B, 2, T, P, C, generator=g).to(narrow)
    case.grads["output"] = torch.ones((), dtype=narrow).expand(grad.shape) if layout == "expanded" else grad
    case.axes = {name: x for name, x in case.axes.items() if name not in ("u", "weights")}
    case.axes["output"] = Axes(batch=0, tokens=2, lane=-1)
    return case


def exponents(result: tuple[Tensor, Tensor]) -> Named:
    return {"output": result[0][:, 2:].double(), "state": result[1][:, 2:].double()}


def comparable(result: tuple[Tensor, Tensor], units: Named) -> Named:
    return {
        "output": true_sums(result[0], units["output"]),
        "state": true_sums(result[1], units["state"]),
    }


def dense_truth(case: Case, backward: bool = True) -> Truth:
    """By the step loop. Everything is linear in v and the gradients, with positive weights: the magnitudes of the terms
    add up to the results of the same case with |v|, |num| and the magnitudes of the gradients.
    """

    def reference(c: Case) -> tuple[Tensor, Tensor]:
        return step_states(c.w, c.k, c.v, c.initial_state)

    results = evaluate(OP, case, reference) if backward else forward(case, reference)
    units = exponents((results["output"], results["state"]))
    sizes = {name: x.abs() if name == "v" else x for name, x in case.inputs.items()}
    if case.initial_state is not None:
        num, den, exp = case.initial_state.unbind(1)
        sizes["initial_state"] = torch.stack([num.abs(), den, exp], dim=1)
    absolute = Case(sizes, {name: x.abs() for name, x in case.grads.items()}, case.axes)
    magnitudes = evaluate(OP, absolute, reference, units) if backward else forward(absolute, reference)
    values = results | comparable((results["output"], results["state"]), units)
    conditions = magnitudes | comparable((magnitudes["output"], magnitudes["state"]), units)
    conditions |= {name: visible(conditions[name], 1) for name in ("k", "v") if name in conditions}
    return Truth({name: values[name] for name in conditions}, conditions, units)


OP = OpContract(
    name="wkv_states",
    case=wkv_states_case,
    choices={
        "P": range(1, 6),
        "C": (1, 3, 16, 19, 35),
        "mixed_dtypes": (False, True),
        "shared": (True, False),
        "state": ("none", "random", "zero"),
        "final_gradient": (False, True),
        "layout": LAYOUTS,
    },
    complete={"state": "random"},
    adversarial={
        "k_range": (4.0, 0.0, 40.0, 300.0),
        "log_decays": ((-6.0, 1.5), (-13.8, 4.4), (-13.8, -8.0), (3.0, 4.4)),
        "growing": (0.0, 0.5, 1.0),
    },
    dense_truth=dense_truth,
    units=exponents,
    comparable=comparable,
    result_dtype=lambda case: case.accumulator,
    is_gradient_causal=False,  # it is the op run the other way, and tokens of no gradient have a say in its units
    configurations=block_sizes(),
)

register(
    Implementation(OP, "reference", wkv_states, "reference", is_token_loop=True),
    Implementation(OP, "torch", wkv_states, "torch"),
    Implementation(OP, "triton", wkv_states, "triton"),
)
