"""The layers, against their equations written out."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from trwkv.modules import ChannelMixing, PerspectiveSelector, TimeMixing, merge_perspectives, token_shift
from trwkv.ops import multi_perspective_wkv

B, T, C, A, P = 2, 9, 8, 12, 3


def randomize(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return module.double()


def sequence(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(x, mix):
    """The token mixed with the one before, one place at a time."""
    before = [torch.zeros_like(x[:, 0])] + [x[:, t] for t in range(x.shape[1] - 1)]
    return torch.stack([mix * x[:, t] + (1 - mix) * before[t] for t in range(x.shape[1])], dim=1)


def single_wkv(module, x, p):
    """sigmoid(r) and WKV of perspective p, straight from the equations: a sum over the past for each token."""

    def row(name):
        vector = getattr(module, name)
        return vector[p] if vector.ndim == 2 else vector

    k, v = module.key(mixed(x, row("time_mix_k"))), module.value(mixed(x, row("time_mix_v")))
    r = torch.sigmoid(module.receptance(mixed(x, row("time_mix_r"))))
    w, u = -torch.exp(row("time_decay")), row("time_first")
    y = []
    for t in range(x.shape[1]):
        past = [torch.exp((t - 1 - i) * w + k[:, i]) for i in range(t)] + [torch.exp(u + k[:, t])]
        y.append(sum(weight * v[:, i] for i, weight in enumerate(past)) / sum(past))
    return r * torch.stack(y, dim=1)


def test_token_shift():
    x = sequence(B, T, C)
    assert torch.equal(token_shift(x)[:, 1:], x[:, :-1])
    assert torch.equal(token_shift(x)[:, 0], torch.zeros(B, C, dtype=x.dtype))
    assert torch.equal(token_shift(x, x[:, 3])[:, 0], x[:, 3])
    assert token_shift(x[:, :0], x[:, 3]).shape == token_shift(x[:, :0]).shape == (B, 0, C)


@pytest.mark.parametrize("aggregation", ["selector", "learned", "mean", "fixed"])
@pytest.mark.parametrize(
    "vectors",
    [
        ["time_decay", "time_first"],
        ["time_decay"],
        ["time_mix_k"],
        ["time_mix_v"],
        ["time_first", "time_mix_r"],
        ["time_decay", "time_first", "time_mix_k", "time_mix_v", "time_mix_r"],
    ],
)
def test_time_mixing_with_perspectives_inside(vectors, aggregation):
    fixed = [0.5, 0.3, 0.2] if aggregation == "fixed" else None
    selector = PerspectiveSelector(C, P, aggregation=aggregation, fixed_weights=fixed)
    module = randomize(TimeMixing(C, A, n_perspectives=P, perspective_vectors=vectors, selector=selector))
    x = sequence(B, T, C)
    weights = selector(x).double().expand(B, T, P)
    expected = module.output(sum(weights[:, :, p, None] * single_wkv(module, x, p) for p in range(P)))
    torch.testing.assert_close(module(x).output, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("vectors", [[], ["time_decay", "time_mix_k"]])
def test_time_mixing_of_streams(vectors):
    module = randomize(TimeMixing(C, A, n_perspectives=P, perspective_vectors=vectors))
    x = sequence(B, T, P, C)
    expected = torch.stack([module.output(single_wkv(module, x[:, :, p], p)) for p in range(P)], dim=2)
    torch.testing.assert_close(module(x).output, expected)


def test_channel_mixing():
    module = randomize(ChannelMixing(C, 20, n_perspectives=P, perspective_vectors=["channel_mix_r"]))
    x = sequence(B, T, P, C)
    for p in range(P):
        k = F.relu(module.key(mixed(x[:, :, p], module.time_mix_k))) ** 2
        r = torch.sigmoid(module.receptance(mixed(x[:, :, p], module.time_mix_r[p])))
        torch.testing.assert_close(module(x).output[:, :, p], r * module.value(k))


@pytest.mark.parametrize("streams", [False, True])
def test_states_continue_a_sequence_at_any_cut(streams):
    selector = None if streams else PerspectiveSelector(C, P)
    vectors = ["time_decay", "time_first"]
    time = randomize(TimeMixing(C, A, n_perspectives=P, perspective_vectors=vectors, selector=selector))
    channel = randomize(ChannelMixing(C))
    x = sequence(B, T, P, C) if streams else sequence(B, T, C)
    for cut in range(T + 1):
        first = time(x[:, :cut], output_state=True)
        assert torch.equal(first.shift_state, x[:, cut - 1] if cut else 0 * x[:, 0])
        second = time(x[:, cut:], shift_state=first.shift_state, wkv_state=first.wkv_state)
        assert first.wkv_state.shape == (B, 3, P, A)
        nothing = time(x[:, :0], shift_state=first.shift_state, wkv_state=first.wkv_state, output_state=True)
        assert torch.equal(nothing.shift_state, first.shift_state)
        torch.testing.assert_close(torch.cat([first.output, second.output], 1), time(x).output)
        first = channel(x[:, :cut], output_state=True)
        second = channel(x[:, cut:], shift_state=first.shift_state)
        torch.testing.assert_close(torch.cat([first.output, second.output], 1), channel(x).output)


def test_selector_weights():
    x = torch.randn(B, T, C)
    for aggregation, fixed in [
        ("selector", None),
        ("learned", None),
        ("mean", None),
        ("fixed", [0.75, 0.25, 0.0]),
    ]:
        weights = PerspectiveSelector(C, P, aggregation=aggregation, fixed_weights=fixed)(x)
        assert weights.shape == ((B, T, P) if aggregation == "selector" else (P,))
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert weights.tolist() == [0.75, 0.25, 0.0]


@pytest.mark.parametrize("aggregation, fixed", [("mean", None), ("fixed", [1 / 3] * 3)])
def test_weights_of_a_float64_model(aggregation, fixed):
    weights = PerspectiveSelector(C, 3, aggregation=aggregation, fixed_weights=fixed)(
        torch.randn(B, T, C).double()
    )
    assert weights.tolist() == [1 / 3] * 3


def test_selector_noise_is_for_training_only():
    x = torch.randn(B, T, C)
    selector = PerspectiveSelector(C, P, noise=0.5)
    assert not torch.equal(selector(x), selector(x))
    selector.eval()
    assert torch.equal(selector(x), selector(x))
    quiet = PerspectiveSelector(C, P)
    assert torch.equal(quiet(x), quiet(x))


def test_selector_starts_close_to_the_mean():
    """As the paper's code does: weights from N(0, 0.01)."""
    gate = PerspectiveSelector(2000, P).gate
    assert gate.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not gate.bias.any()
    assert not PerspectiveSelector(C, P, aggregation="learned").logits.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"aggregation": "median"},
            "aggregation: expected one of selector, mean, fixed, learned; got 'median'",
        ),
        ({"aggregation": "fixed"}, "fixed_weights: expected with aggregation 'fixed' and only then"),
        ({"fixed_weights": [1, 0, 0]}, "fixed_weights: expected with aggregation 'fixed' and only then"),
        ({"aggregation": "fixed", "fixed_weights": [0.5, 0.5]}, "expected 3 numbers that sum to 1"),
        ({"aggregation": "fixed", "fixed_weights": [0.5, 0.5, 0.5]}, "expected 3 numbers that sum to 1"),
        (
            {"aggregation": "fixed", "fixed_weights": [float("nan"), 0.5, 0.5]},
            "expected 3 numbers that sum to 1",
        ),
    ],
)
def test_wrong_selectors(options, message):
    with pytest.raises(ValueError, match=message):
        PerspectiveSelector(C, P, **options)


@pytest.mark.parametrize(
    ("layer", "names", "message"),
    [
        (TimeMixing, ["time_decya"], "some of time_decay, .*; got ['time_decya']"),
        (TimeMixing, "time_decay", "some of time_decay, .*; got 'time_decay'"),
        (ChannelMixing, ["time_mix_k"], "some of channel_mix_k, channel_mix_r; got ['time_mix_k']"),
        (ChannelMixing, "channel_mix_k", "some of channel_mix_k, channel_mix_r; got 'channel_mix_k'"),
    ],
)
def test_unknown_vectors(layer, names, message):
    message = f"perspective_vectors: expected a list of {message}".replace("[", r"\[")
    with pytest.raises(ValueError, match=message):
        layer(C, n_perspectives=P, perspective_vectors=names)


def test_perspectives_that_would_be_the_same_are_refused():
    selector = PerspectiveSelector(C, P)
    with pytest.raises(ValueError, match="expected at least one with n_perspectives = 3; got none"):
        TimeMixing(C, n_perspectives=P, selector=selector)
    with pytest.raises(ValueError, match="selector: expected one of n_perspectives = 2; got one of 3"):
        TimeMixing(C, n_perspectives=2, perspective_vectors=["time_decay"], selector=selector)
    for layer in (TimeMixing, ChannelMixing):
        with pytest.raises(ValueError, match="n_perspectives: expected a whole number of at least 1; got 0"):
            layer(C, n_perspectives=0)


def test_inputs_of_another_shape_are_refused():
    """[1, 1, P], too, whose last axis could pass for perspectives."""
    single = TimeMixing(C), ChannelMixing(C)
    vectors = ["time_decay"]
    merged = TimeMixing(C, n_perspectives=P, perspective_vectors=vectors, selector=PerspectiveSelector(C, P))
    streams = (
        TimeMixing(C, n_perspectives=P),
        ChannelMixing(C, n_perspectives=P, perspective_vectors=["channel_mix_r"]),
    )
    for layer in (*single, merged):
        for shape in [(), (C,), (T, C), (B, T, C + 1), (1, 1, P), (B, T, P, 1), (B, T, 1, 1, C)]:
            with pytest.raises(ValueError, match=rf"x: expected shape \[B, T, .*8\]; got \{list(shape)}"):
                layer(torch.zeros(shape))
    for layer in streams:
        for shape in [(P, C), (B, T, C), (B, P, C), (B, T, P + 1, C), (B, T, P, C + 1)]:
            with pytest.raises(ValueError, match=rf"x: expected shape \[B, T, 3, 8\]; got \{list(shape)}"):
                layer(torch.zeros(shape))


def test_initial_values_are_rwkv4s():
    """The curves at layer 1 of 4, from the formulas of RWKV-4's training code."""
    module = TimeMixing(C, A, layer_index=1, n_layers=4)
    depth, height = 1 / 3, 3 / 4
    for a in range(A):
        expected = -5 + 8 * (a / (A - 1)) ** (0.7 + 1.3 * depth)
        assert module.time_decay[a].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert module.time_first[a].item() == pytest.approx(-1.2039728 + [0, 0.5, -0.5][a % 3], rel=1e-5)
    for c in range(C):
        assert module.time_mix_k[c].item() == pytest.approx((c / C) ** height, rel=1e-5)
        assert module.time_mix_v[c].item() == pytest.approx((c / C) ** height + 0.3 * depth, rel=1e-5)
        assert module.time_mix_r[c].item() == pytest.approx((c / C) ** (height / 2), rel=1e-5)
    zero = [name for name, x in module.named_parameters() if not x.any()]
    assert zero == ["key.weight", "receptance.weight", "output.weight"]
    gram = module.value.weight.T @ module.value.weight
    torch.testing.assert_close(gram, A / C * torch.eye(C), rtol=1e-4, atol=1e-4)


def test_fresh_perspectives_differ_in_decay():
    module = TimeMixing(C, n_perspectives=P, perspective_vectors=["time_decay", "time_first"], selector=None)
    spread = module.time_decay - TimeMixing(C).time_decay
    torch.testing.assert_close(spread, torch.tensor([[-1.0], [0.0], [1.0]]).expand(P, C), rtol=0, atol=1e-5)
    assert torch.equal(module.time_first[0], module.time_first[2])
    noisy = TimeMixing(C, n_perspectives=P, perspective_vectors=["time_first"], perspective_noise=0.1)
    assert torch.equal(noisy.time_first[0], module.time_first[0])
    assert not torch.equal(noisy.time_first[1], noisy.time_first[0])


def best_fit(n_perspectives: int) -> float:
    """Relative error of the best fit, by P perspectives on one channel, to half a fast and half a slow memory.

    Variable projection: for any decays the best weights are a small least-squares problem, so that only the decays
    (and bonuses) are searched for.
    """
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 256, 1, generator=generator, dtype=torch.float64)

    def wkv(time_decay, time_first):
        w, u = -torch.exp(time_decay).unsqueeze(1), time_first.unsqueeze(1)
        return multi_perspective_wkv(w, u, k, v, backend="torch").output[0, :, :, 0]  # [T, P]

    target = wkv(torch.tensor([1.0, -4.0]).double(), torch.zeros(2).double()).mean(1)

    def error_from(start: float) -> float:
        time_decay = (start + torch.linspace(0, 3, n_perspectives).double()).requires_grad_()
        time_first = torch.full((n_perspectives,), 0.3).double().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [time_decay, time_first],
            max_iter=300,
            tolerance_grad=1e-14,
            tolerance_change=1e-18,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def loss():
            y = wkv(time_decay, time_first)
            gram = y.T @ y + 1e-14 * torch.eye(n_perspectives)
            weights = torch.linalg.solve(gram, y.T @ target)
            return (y @ weights - target).square().sum() / target.square().sum()

        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
        return loss().item() ** 0.5

    return min(error_from(start) for start in (-5.0, -3.0, -1.0, 1.0))


def test_a_sum_of_decays_needs_two_perspectives():
    assert best_fit(1) > 4e-2
    assert best_fit(2) < 1e-8


def test_merge_perspectives():
    y, weights = sequence(B, T, P, C), torch.softmax(sequence(B, T, P), -1)
    torch.testing.assert_close(merge_perspectives(y, weights), torch.einsum("btpc,btp->btc", y, weights))


def test_modules_need_no_model_library():
    code = "import sys, trwkv.modules; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
