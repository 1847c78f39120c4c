"""Exact on any finite input: k over +-300 in one chunk, w from -1e-6 to -80 and positive, huge |u|, long T."""

from dataclasses import replace

import pytest
import torch

from tests.contracts.support import case_of, everywhere, hold
from trwkv.testing import CONTRACTS, IMPLEMENTATIONS, SMALL, Implementation, truth_of
from trwkv.testing.contracts import forward_accuracy


@everywhere("any finite input")
def test_any_finite_input(implementation: Implementation) -> None:
    hold("any finite input", implementation, times=2 if implementation.is_interpreted else 1)


@everywhere(speed="fast")
@pytest.mark.parametrize("log_decays", [(-13.8, -9.0), (-6.0, 1.5)], ids=["slow", "usual"])
@pytest.mark.parametrize("k_range", [4.0, 300.0])
def test_4096_tokens(implementation: Implementation, log_decays: tuple[float, float], k_range: float) -> None:
    case = case_of(
        implementation, B=1, T=4096, state="none", k_range=k_range, log_decays=log_decays, growing=0.3
    )
    forward_accuracy(implementation, case)


@everywhere(speed="fast")
def test_gradients_over_1500_tokens(implementation: Implementation) -> None:
    case = case_of(implementation, B=1, T=1500, P=1, C=2, k_range=10.0, log_decays=(-8.0, -4.0))
    CONTRACTS["agreement"](implementation, case)


@pytest.mark.slow
@everywhere(speed="fast")
@pytest.mark.parametrize("log_decays", [(-13.8, -9.0), (-6.0, 4.4)], ids=["slow", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_65536_tokens(
    implementation: Implementation, log_decays: tuple[float, float], dtype: torch.dtype
) -> None:
    case = case_of(
        implementation, B=1, T=65536, k_range=300.0, log_decays=log_decays, growing=0.3, dtype=dtype
    )
    forward_accuracy(implementation, case)


@pytest.mark.parametrize(
    "name",
    [
        "wkv/torch-chunk",
        "wkv_states/torch",
        "wkv/triton-chunk",
        "wkv/triton-recurrent",
    ],
)
def test_a_state_that_nothing_joins(name: str) -> None:
    """One token, then 300 that weigh nothing, under decays of 1e-6 to 1e-4: what rounds alike at every step adds up."""
    implementation = IMPLEMENTATIONS[name]
    case = implementation.op.case(B=1, T=300, P=1, C=8, final_gradient=False)
    case.w[:] = -torch.exp(torch.linspace(-13.8, -9.0, 8))
    case.k[:, 1:] -= 60.0
    with implementation.configured():
        forward_accuracy(implementation, case.to(implementation.device))


CHUNK_OF_192 = SMALL | {"chunk_len": 192}
"""48 tiles, whose sums the forward's first walk adds from the last to the first."""


def test_many_light_tiles_before_a_heavy_token() -> None:
    """Each of 47 tiles weighs just less than half an ulp of the last token of their chunk: together 43 half-ulps."""
    implementation = IMPLEMENTATIONS["wkv/triton-chunk"]
    case = implementation.op.case(B=1, T=240, P=1, C=8, state="none", dtype=torch.float32)
    case.w[:] = -torch.exp(torch.linspace(-13.8, -11.0, 8))
    case.k[:] = -200.0
    case.k[:, :188] = -18.1
    case.k[:, 191] = 0.0
    case.v[:] = -1.0
    case.v[:, 191] = 1.0
    with implementation.configured(CHUNK_OF_192):
        forward_accuracy(implementation, case.to(implementation.device))


@pytest.mark.parametrize("w, tiles, tokens", [(-0.02, 48, 4), (-2.7, 48, 4), (30.0, 48, 4), (-0.345, 160, 2)])
def test_one_tile_of_a_chunk(w: float, tiles: int, tokens: int) -> None:
    """Some token of a chunk outweighs all others, however much has decayed since; on either path.

    w = -0.345 makes a tile's decay 1.01 * 2^-1: the mantissas of 160 together are below float32.
    """
    implementation = IMPLEMENTATIONS["wkv/triton-chunk"]
    chunk_len = tiles * tokens
    case = implementation.op.case(B=1, T=chunk_len + 8, P=2, C=12, state="none")
    case.w[:] = torch.tensor([[w], [w / 7]])
    heavy = torch.arange(12) * (chunk_len // 12 + 1)
    case.k[:] = -300.0
    case.k[:] += torch.arange(12).fmod(2).mul(250.0)  # the others nearer, in every second channel
    case.k[:, heavy, torch.arange(12)] = 60.0 - w * (chunk_len - heavy)
    with implementation.configured(SMALL | {"fwd_block_t": tokens, "chunk_len": chunk_len}):
        forward_accuracy(implementation, case.to(implementation.device))


@pytest.mark.parametrize(
    "name, T", [("wkv/torch-chunk", 192), ("wkv/triton-chunk", 192), ("wkv/triton-chunk", 384)]
)
def test_an_adjoint_that_nothing_joins(name: str, T: int) -> None:
    """Only the final state sends a gradient back, in chunks of 192, under decays of 1e-6 to 1e-4."""
    implementation = IMPLEMENTATIONS[name]
    case = implementation.op.case(B=1, T=T, P=1, C=8, log_decays=(-13.8, -9.0))
    case = replace(case, grads={"state": case.grads["state"]})
    truth = truth_of(implementation.op, case)
    with implementation.configured(CHUNK_OF_192 if implementation.backend == "triton" else None):
        implementation.check(case.to(implementation.device), truth)


@pytest.mark.parametrize("name", ["wkv/torch-chunk", "wkv/triton-chunk"])
def test_gradients_beside_a_state_that_nothing_joins(name: str) -> None:
    """As above in two chunks of 192, and only the last 32 outputs send a gradient back."""
    implementation = IMPLEMENTATIONS[name]
    case = implementation.op.case(B=1, T=384, P=1, C=8, log_decays=(-13.8, -9.0), final_gradient=False)
    case.k[:, 1:] -= 60.0
    case.grads["output"][:, :-32] = 0.0
    case.grads["output"].abs_()  # so that they do not cancel, and errors do not either
    truth = truth_of(implementation.op, case)
    with implementation.configured(CHUNK_OF_192 if implementation.backend == "triton" else None):
        implementation.check(case.to(implementation.device), truth)


@everywhere()
@pytest.mark.parametrize("exponent", [-250.0, 250.0])
def test_a_state_far_from_the_tokens(implementation: Implementation, exponent: float) -> None:
    """A state that outweighs every token by e^250 decays until they count; one that much lighter does not count."""
    case = case_of(implementation, B=1, T=12, P=1, C=1, state="random", k_range=1.0, log_decays=(-4.0, 3.0))
    case.initial_state[:, 2] = exponent
    CONTRACTS["any finite input"](implementation, case)


@everywhere()
@pytest.mark.parametrize("exponent", [95.0, 120.0, 165.0, 280.0])
def test_tokens_that_vanish_beside_the_state(implementation: Implementation, exponent: float) -> None:
    """2^-137 to 2^-400 of it: beyond float32, though whole tiles are computed in the state's unit."""
    case = case_of(implementation, B=1, T=40, P=2, C=4, state="random", k_range=1.0, log_decays=(-9.0, -4.0))
    case.initial_state[:, 2] = exponent
    CONTRACTS["any finite input"](implementation, case)


@everywhere()
@pytest.mark.parametrize(
    "distance, log_decays", [(300.0, (-9.0, -4.0)), (60.0, (0.0, 1.5))], ids=["slow", "fast"]
)
def test_perspectives_far_apart(
    implementation: Implementation, distance: float, log_decays: tuple[float, float]
) -> None:
    """States that outweigh each other by up to e^600: those that fade quickly meet, and then differ again."""
    case = case_of(implementation, B=1, T=40, P=3, C=2, state="random", k_range=1.0, log_decays=log_decays)
    case.initial_state[:, 2] = distance * torch.tensor([[[0.0], [-1.0], [1.0]]])
    case.k[:, 24:26] += distance
    CONTRACTS["any finite input"](implementation, case)


@everywhere()
def test_tiles_of_rising_tokens(implementation: Implementation) -> None:
    """The first of 4 weighs e^-80 of the last, and with a bonus of -60 it is the only one that its output sees."""
    case = case_of(implementation, B=1, T=8, P=2, C=2, state="none", log_decays=(-9.0, 4.0))
    case.k[:] = torch.linspace(-80.0, 0.0, 4).repeat(2)[:, None]
    if "u" in case.inputs:
        case.u[:] = torch.tensor([[-60.0], [0.0]])
    CONTRACTS["any finite input"](implementation, case)


@everywhere()
@pytest.mark.parametrize("w", [-30.0, 30.0])
def test_a_state_and_few_tokens(implementation: Implementation, w: float) -> None:
    """A state that outweighs the first token of a tile by e^70 and is forgotten, or grows, by e^30 at each."""
    case = case_of(implementation, B=1, T=8, P=2, C=2, k_range=1.0, state="random", log_decays=(-9.0, -4.0))
    case.w[1] = w
    case.k[:, ::4] -= 70.0
    CONTRACTS["any finite input"](implementation, case)


@pytest.mark.parametrize(
    "name, T", [("wkv/triton-chunk", 60), ("wkv/triton-chunk", 200), ("wkv/triton-recurrent", 60)]
)
def test_values_of_1e37(name: str, T: int) -> None:
    """Their sums would leave float32 if they were not kept below 1: of the second perspective, which forgets little."""
    implementation = IMPLEMENTATIONS[name]
    case = implementation.op.case(B=1, T=T, P=2, C=2, k_range=0.1, final_gradient=False)
    case.w[:] = torch.tensor([[-3.0], [-1e-6]])
    case.k[:] += 0.6  # four tokens weigh just less than a power of two
    case.v[:] = 1e37
    truth = truth_of(implementation.op, case, backward=False)
    with implementation.configured(CHUNK_OF_192):
        output = implementation.run(case.to(implementation.device))[0]
    implementation.assert_accurate({"output": output}, truth)  # the state's sums do leave it


@everywhere()
def test_a_fresh_perspective_beside_others(implementation: Implementation) -> None:
    case = case_of(implementation, B=1, T=12, P=3, C=2, state="random", k_range=1.0, log_decays=(-9.0, 0.0))
    case.initial_state[:, :2, 1] = 0.0
    CONTRACTS["any finite input"](implementation, case)


@everywhere(is_kernel=False)
def test_an_exponent_that_drifts(implementation: Implementation) -> None:
    """A state of exponent 1149, under decays of 1e-6 to 3e-4, in float64: a rounding of each sum adds up."""
    case = case_of(implementation, B=1, T=129, P=1, C=32, dtype=torch.float64, log_decays=(-13.8, -8.0))
    case.initial_state[:, 2] = 1149.0
    CONTRACTS["split"](implementation, case, at=50)
    CONTRACTS["agreement"](implementation, case)


@everywhere()
def test_masked_tokens(implementation: Implementation) -> None:
    """k of -1e5 to -3e38, as masks have it, alone in a tile and beside others: such tokens weigh nothing."""
    case = case_of(implementation, B=1, T=13, P=1, C=8, k_range=1.0, log_decays=(-6.0, -2.0))
    case.k[:, [1, 4, 5, 6, 7, 10]] = -(10.0 ** torch.linspace(5.0, 38.5, 48).view(6, 8))
    CONTRACTS["any finite input"](implementation, case)


@pytest.mark.parametrize("name", ["wkv/torch-chunk", "wkv/triton-chunk", "wkv_states/torch"])
def test_a_long_fall(name: str) -> None:
    """One token, then silence 200 nats below it: it fades by half a mantissa a step until the two are equal.

    The second channel, beyond every bound, keeps its neighbour on the exact path.
    """
    implementation = IMPLEMENTATIONS[name]
    case = implementation.op.case(B=1, T=152, P=1, C=2, k_range=300.0, final_gradient=False)
    case.w[:] = torch.tensor([-1.379, -80.0])
    case.k[:, :, 0] = -200.0
    case.k[:, 0, 0] = 0.0
    with implementation.configured():
        forward_accuracy(implementation, case.to(implementation.device))
