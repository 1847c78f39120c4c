"""from_pretrained: devices and dtypes."""

import pytest
import torch
from test_models import random_model, random_tokens

from trwkv.models import TemporalRwkvForCausalLM

GREEDY = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
@pytest.mark.parametrize("tied", [False, True])
def test_a_device_map_changes_nothing(tmp_path, device_map, tied):
    model, tokens = random_model("stream", tie_word_embeddings=tied), random_tokens(2, 6)
    model.save_pretrained(tmp_path)
    placed = TemporalRwkvForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert (placed.head.weight is placed.rwkv.emb.weight) == tied
    for beams in (1, 3):
        options = GREEDY | {"num_beams": beams}
        there = placed.generate(tokens.to(placed.device), **options)
        assert torch.equal(there.cpu(), model.generate(tokens, **options))


@pytest.mark.parametrize("kind", ["layer, own keys", "stream"])
def test_blocks_on_disk_generate_the_same(tmp_path, kind):
    """Every parameter of a block is brought in by a hook just before it is used, and dropped after."""
    model, tokens = random_model(kind), random_tokens(2, 6)
    model.save_pretrained(tmp_path / "model")
    names = [
        "rwkv.emb",
        "rwkv.blocks.0",
        "rwkv.ln_out",
        "head",
        *(["rwkv.selector"] if kind == "stream" else []),
    ]
    offloaded = TemporalRwkvForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=dict.fromkeys(names, "cpu") | {"rwkv.blocks.1": "disk"},
        offload_folder=tmp_path / "disk",
    )
    assert all(x.is_meta for x in offloaded.rwkv.blocks[1].parameters())
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    for beams in (1, 3):
        options = GREEDY | {"num_beams": beams, "attention_mask": mask}
        assert torch.equal(offloaded.generate(tokens, **options), model.generate(tokens, **options))


def test_no_device_map_splits_a_block():
    """What the pieces are that a map is made of: whole blocks, whatever the room."""
    accelerate = pytest.importorskip("accelerate")
    with torch.device("meta"):
        model = random_model()
    size = sum(x.numel() * 4 for x in model.rwkv.blocks[0].parameters())
    room = {0: int(1.5 * size) + 64 * 32 * 4, "cpu": 10**9}
    placed = accelerate.infer_auto_device_map(model, room, no_split_module_classes=model._no_split_modules)
    assert {0, "cpu"} == set(placed.values())
    assert not [name for name in placed if name.startswith("rwkv.blocks.") and name.count(".") > 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "stream"])
@torch.no_grad()
def test_half_precision_decodes_as_it_reads(tmp_path, kind, dtype):
    """Loaded so, decay, bonus and WKV state are float32; `.to(dtype)` has the decay and bonus rounded too."""
    model, tokens = random_model(kind), random_tokens(2, 24)
    model.save_pretrained(tmp_path)
    expected = model(tokens).logits
    low = TemporalRwkvForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {
        x.dtype for name, x in low.named_parameters() if "time_decay" in name or "time_first" in name
    } == {torch.float32}
    rounded = random_model(kind).to(dtype)
    assert {x.dtype for x in rounded.parameters()} == {dtype}
    error = {}
    for name, half in {"loaded": low, "rounded": rounded}.items():
        cache = half(tokens[:, :8]).cache
        steps = [half(tokens[:, t : t + 1], cache=cache).logits for t in range(8, 24)]
        assert {
            x.dtype for layer in cache.layers for x in (layer.attention_shift, layer.feed_forward_shift)
        } == {dtype}
        assert {layer.wkv.dtype for layer in cache.layers} == {torch.float32}
        error[name] = (
            torch.cat(steps, dim=1).float() - expected[:, 8:]
        ).square().mean().sqrt() / expected.std()
    assert max(error.values()) < 3 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize("kind", ["layer", "stream"])
@torch.no_grad()
def test_float16_holds_what_a_deep_model_adds_up(tmp_path, kind):
    """The stream of 13 blocks exceeds 65,504, the most that float16 holds: it is halved twice on its way."""
    model, tokens = random_model(kind, num_hidden_layers=13), random_tokens(2, 24)
    for i, block in enumerate(model.rwkv.blocks):
        block.ffn.value.weight.mul_((10.0, 400.0, 1600.0)[i // 6])
    stream = []
    model.rwkv.ln_out.register_forward_pre_hook(lambda module, inputs: stream.append(inputs[0]))
    model.save_pretrained(tmp_path)
    expected = model(tokens).logits
    assert stream[0].abs().max() > 65504
    half = TemporalRwkvForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    cache = half(tokens[:, :20]).cache
    for logits in (half(tokens).logits[:, 20:], half(tokens[:, 20:], cache=cache).logits):
        error = (logits.float() - expected[:, 20:]).abs().max()
        assert error < 0.02 * expected.abs().max()
