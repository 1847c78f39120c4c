"""torch.compile: of the model, step by step, and by generate()."""

import pytest
import torch
from test_models import random_model, random_tokens
from transformers import CompileConfig

from trwkv.models import TemporalRwkvCache
from trwkv.models.cache import CACHE_NAME

GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


class CountingBackend:
    """Runs each graph as it is, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("kind", "static"), [("rwkv4", True), ("layer", False), ("layer, own keys", False), ("stream", True)]
)
@torch.no_grad()
def test_decoding_is_one_graph_for_all_steps(kind, static):
    model, tokens, backend = random_model(kind), random_tokens(2, 12), CountingBackend()
    expected = model(tokens).logits
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    cache = TemporalRwkvCache(2, static=static)
    model(tokens[:, :4], cache=cache)
    addresses = [x.data_ptr() for layer in cache.layers for x in layer.states().values()]
    for t in range(4, 12):
        logits = compiled(tokens[:, t : t + 1], cache=cache).logits
        torch.testing.assert_close(logits, expected[:, t : t + 1], rtol=0, atol=2e-5)
    assert backend.graphs == 1
    assert cache.get_seq_length() == 12
    if static:
        assert [x.data_ptr() for layer in cache.layers for x in layer.states().values()] == addresses


def assert_one_training_graph(steps):
    """Compiled, the gradients of these steps, arguments of the model each, are as without, all by one graph."""
    model, backend = random_model().train(), CountingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for arguments in steps:
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            run(**arguments).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert backend.graphs == 1


def test_training_with_padding_is_one_graph():
    mask, steps = torch.tensor([[1] * 9, [1] * 5 + [0] * 4]), []
    for tokens, here in ((random_tokens(2, 9), mask), (random_tokens(2, 9, seed=0), mask.flip(0))):
        labels = tokens.masked_fill(here == 0, -100)
        steps.append({"input_ids": tokens, "attention_mask": here, "labels": labels})
    assert_one_training_graph(steps)


def test_training_on_packed_sequences_is_one_graph():
    tokens = random_tokens(1, 18)
    assert_one_training_graph(
        {"input_ids": tokens, "labels": tokens, "cu_seqlens": torch.tensor(bounds)}
        for bounds in ([0, 5, 5, 6, 13, 14, 18, 18], [0, 0, 4, 5, 12, 13, 13, 18])
    )


def test_generate_compiles_the_step_on_a_static_cache():
    model, tokens = random_model(), random_tokens(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    expected = model.generate(tokens, attention_mask=mask, **GREEDY)
    backend, whole = CountingBackend(), torch._dynamo.lookup_backend("aot_eager")
    count = lambda graph, inputs: backend(graph, inputs) and whole(graph, inputs)  # noqa: E731 (an object is copied)
    config = CompileConfig(backend=count, fullgraph=True, mode=None)
    config._compile_all_devices = True
    options = GREEDY | {"compile_config": config, "return_dict_in_generate": True}
    for _ in range(2):
        output = model.generate(tokens, attention_mask=mask, cache_implementation="static", **options)
        assert torch.equal(output.sequences, expected)
        assert output[CACHE_NAME].is_compileable
    assert backend.graphs == 1
    assert torch.equal(model.generate(tokens, attention_mask=mask, **options).sequences, expected)
    assert backend.graphs == 1  # the usual cache is not compiled for
