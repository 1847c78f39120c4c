"""Hypothesis strategies: shapes, dtypes, layouts and options drawn together."""

import torch
from hypothesis import strategies as st

from trwkv.testing import WkvCase, wkv_case

EDGES = [1, 2, 3, 4, 5, 8, 15, 16, 17, 33]
LONG = [63, 64, 65, 127, 128, 129, 130]


@st.composite
def cases(
    draw: st.DrawFn, *, adversarial: bool = False, dtypes: tuple[torch.dtype, ...] = (), long: bool = True
) -> WkvCase:
    T = draw(st.sampled_from(EDGES + LONG if long else EDGES))
    wild = {}
    if adversarial:
        wild = {
            "k_range": draw(st.sampled_from([0.0, 40.0, 300.0])),
            "u_range": draw(st.sampled_from([0.0, 30.0, 300.0])),
            "log_decays": draw(st.sampled_from([(-13.8, 4.4), (-13.8, -8.0), (3.0, 4.4)])),
        }
    return wkv_case(
        B=draw(st.integers(1, 2)),
        T=T,
        P=draw(st.integers(1, 5 if T < 32 else 2)),
        C=draw(st.sampled_from([1, 3, 16, 19])),
        seed=draw(st.integers(0, 10**6)),
        dtype=draw(st.sampled_from(dtypes or (torch.float32, torch.bfloat16, torch.float16))),
        shared=draw(st.booleans()),
        weights=draw(st.sampled_from(["none", "P", "PC", "BTP"])),
        state=draw(st.sampled_from(["none", "zero", "random"])),
        final_gradient=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "strided"])),
        **wild,
    )
