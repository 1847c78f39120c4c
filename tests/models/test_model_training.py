"""What of a model trains, and that it does."""

import pytest
import torch
from test_models import KINDS, SIZES, random_model, random_tokens

from trwkv.models import TemporalRwkvCache, TemporalRwkvConfig, TemporalRwkvForCausalLM


@pytest.mark.parametrize("kind", ["layer", "stream"])
def test_freeze_base_may_train_what_perspectives_add_and_nothing_else(kind):
    model, tokens = random_model(kind).train(), random_tokens(2, 12)
    assert model.freeze_base(train_vectors=False) is model
    added = dict(model.perspective_parameters())
    assert {name for name, x in model.named_parameters() if x.requires_grad} == set(added)
    assert model.count_parameters().trainable == sum(x.numel() for x in added.values())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.Adam([x for x in model.parameters() if x.requires_grad], lr=0.01)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == set(added)


def test_perspective_parameters_are_the_chosen_vectors_and_the_selectors():
    names = {name.removeprefix("rwkv.") for name, _ in random_model("layer").perspective_parameters()}
    expected = {f"blocks.{i}.att.{x}" for i in range(2) for x in ("time_decay", "time_first")}
    assert names == expected | {
        f"blocks.{i}.att.selector.gate.{x}" for i in range(2) for x in ("weight", "bias")
    }
    stream = random_model("stream, learned", perspective_vectors=["time_mix_k", "channel_mix_r"])
    names = {name.removeprefix("rwkv.") for name, _ in stream.perspective_parameters()}
    expected = {f"blocks.{i}.{x}" for i in range(2) for x in ("att.time_mix_k", "ffn.time_mix_r")}
    assert names == expected | {"selector.logits"}


def test_freeze_base_may_leave_the_head_and_works_with_one_perspective():
    model = random_model("rwkv4").freeze_base(train_head=True)
    trainable = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trainable == {name for name, _ in model.vector_parameters()} | {"head.weight"}
    assert not random_model("rwkv4").freeze_base().head.weight.requires_grad


@pytest.mark.parametrize("kind", ["rwkv4", "layer", "stream"])
def test_freeze_base_leaves_all_vectors(kind):
    model = random_model(kind).freeze_base()
    trainable = {name for name, x in model.named_parameters() if x.requires_grad}
    vectors = {name for name, _ in model.named_parameters() if ".time_" in name}
    assert len(vectors) == 2 * 7
    assert trainable == vectors | {name for name, _ in model.perspective_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_training_from_scratch_learns(kind):
    torch.manual_seed(0)
    model = TemporalRwkvForCausalLM(TemporalRwkvConfig(**SIZES, **KINDS[kind], selector_noise=0.1)).train()
    tokens = random_tokens(4, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(64.0).log().item(), abs=0.3)
    assert losses[-1] < 0.5 * losses[0]
    if kind != "rwkv4":
        for name, rows in model.perspective_parameters():
            if "selector" not in name:
                assert not torch.allclose(rows[0], rows[1], atol=1e-4), name


def test_every_parameter_gets_a_gradient():
    for kind in KINDS:
        model, tokens = random_model(kind).train(), random_tokens(2, 9)
        model(tokens, labels=tokens).loss.backward()
        missing = [name for name, x in model.named_parameters() if x.grad is None or not x.grad.any()]
        assert not missing, (kind, missing)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["layer", "stream"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, use_reentrant):
    tokens, grads = random_tokens(2, 9), []
    for checkpointing in (False, True):
        model = random_model(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert all(block.gradient_checkpointing for block in model.rwkv.blocks)
            with pytest.raises(ValueError, match="gradient checkpointing"):
                model(tokens, cache=TemporalRwkvCache(2))
        model(tokens, labels=tokens).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


def test_loss_is_divided_by_the_items_of_the_whole_batch():
    model, tokens = random_model(), random_tokens(2, 9)
    mean = model(tokens, labels=tokens).loss
    assert torch.allclose(model(tokens, labels=tokens, num_items_in_batch=32).loss, mean / 2)
    labels = tokens.clone()
    labels[:, :5] = -100
    logits = model(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, 4:-1].flatten(0, 1), tokens[:, 5:].flatten())
    assert torch.allclose(model(tokens, labels=labels).loss, expected)
