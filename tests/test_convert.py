"""RWKV-4 checkpoints in and out, against the two programs that read them: `rwkv` and `transformers`."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import RwkvConfig, RwkvForCausalLM

from trwkv.convert import read_rwkv4
from trwkv.models import TemporalRwkvForCausalLM

VOCAB, C, LAYERS = 71, 32, 2
TOLERANCE = 1e-5
AGGREGATIONS = {"selector": None, "mean": None, "learned": None, "fixed": [0.2, 0.5, 0.3]}


def random_official(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """An RWKV-4 with random weights, its names written out as in the official files."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, shift=0.0):
        return (shift + scale * torch.randn(*shape, generator=generator)).to(dtype)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator).to(dtype)

    state = {"emb.weight": normal(VOCAB, C)}
    for i in range(LAYERS):
        for ln in ["ln1", "ln2"] + ["ln0"] * (i == 0):
            state[f"blocks.{i}.{ln}.weight"] = normal(C, scale=0.1, shift=1)
            state[f"blocks.{i}.{ln}.bias"] = normal(C, scale=0.1)
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        state[att + "time_decay"] = normal(C, scale=2, shift=-1)
        state[att + "time_first"] = normal(C)
        for name in (
            "att.time_mix_k",
            "att.time_mix_v",
            "att.time_mix_r",
            "ffn.time_mix_k",
            "ffn.time_mix_r",
        ):
            state[f"blocks.{i}.{name}"] = uniform(1, 1, C)
        for name in ("key", "value", "receptance", "output"):
            state[att + name + ".weight"] = normal(C, C, scale=C**-0.5)
        state[ffn + "key.weight"] = normal(4 * C, C, scale=C**-0.5)
        state[ffn + "receptance.weight"] = normal(C, C, scale=C**-0.5)
        state[ffn + "value.weight"] = normal(C, 4 * C, scale=C**-0.5)
    state |= {"ln_out.weight": normal(C, scale=0.1, shift=1), "ln_out.bias": normal(C, scale=0.1)}
    return state | {"head.weight": normal(VOCAB, C, scale=C**-0.5)}


def random_hf_model(**options) -> RwkvForCausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "hidden_size": C, "num_hidden_layers": LAYERS}
    model = RwkvForCausalLM(RwkvConfig(**(sizes | options), rescale_every=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def official_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "rwkv4.pth"
    torch.save(random_official(), path)
    return path


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, VOCAB, (2, 23), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(model, tokens):
    # no cache: transformers' own has the wrong size for attention_hidden_size != hidden_size
    return model(tokens, use_cache=False).logits


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def test_official_file_computes_what_the_rwkv_package_computes(official_file, tokens):
    os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    from rwkv.model import RWKV

    oracle = RWKV(model=str(official_file), strategy="cpu fp32")
    ours = logits_of(TemporalRwkvForCausalLM.from_rwkv4(official_file), tokens)
    for row in range(2):
        expected, _ = oracle.forward(tokens[row].tolist(), None, full_output=True)
        torch.testing.assert_close(ours[row], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", ["safetensors", "bin", "safetensors shards", "bin shards", "tied"])
def test_hf_folder_computes_what_transformers_computes(tmp_path, tokens, form):
    sizes = {"attention_hidden_size": 48, "intermediate_size": 80, "tie_word_embeddings": form == "tied"}
    oracle = random_hf_model(**sizes, bos_token_id=3, eos_token_id=4, context_length=99)
    oracle.save_pretrained(tmp_path, max_shard_size="20KB" if "shards" in form else "1GB")
    if "bin" in form:
        for file in tmp_path.glob("*.safetensors"):
            torch.save(
                load_file(file),
                file.with_name(file.name.replace("model", "pytorch_model")).with_suffix(".bin"),
            )
            file.unlink()
        for index in tmp_path.glob("*.index.json"):
            text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (tmp_path / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    assert (len(list(tmp_path.glob("*.safetensors")) + list(tmp_path.glob("*.bin"))) > 1) == (
        "shards" in form
    )
    model = TemporalRwkvForCausalLM.from_rwkv4(tmp_path)
    torch.testing.assert_close(logits_of(model, tokens), logits_of(oracle, tokens), rtol=0, atol=TOLERANCE)
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.context_length) == (3, 4, 99)
    assert (model.head.weight is model.rwkv.emb.weight) == (form == "tied")


@pytest.mark.filterwarnings("ignore:aggregation:UserWarning")
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("placement", "vectors"),
    [
        ("layer", None),
        ("layer", ["time_first"]),
        ("layer", ["time_mix_k"]),
        ("layer", ["time_decay", "time_mix_v", "time_mix_r"]),
        ("stream", None),
        ("stream", ["channel_mix_r"]),
    ],
)
def test_three_perspectives_without_noise_compute_the_base(
    official_file, tokens, placement, vectors, aggregation
):
    base = TemporalRwkvForCausalLM.from_rwkv4(official_file)
    model = TemporalRwkvForCausalLM.from_rwkv4(
        official_file,
        n_perspectives=3,
        placement=placement,
        perspective_vectors=vectors,
        aggregation=aggregation,
        fixed_weights=AGGREGATIONS[aggregation],
    )
    torch.testing.assert_close(logits_of(model, tokens), logits_of(base, tokens), rtol=0, atol=TOLERANCE)
    assert model.count_parameters().added > 0


def test_noise_sets_all_but_the_first_perspective_apart(official_file):
    base = TemporalRwkvForCausalLM.from_rwkv4(official_file).state_dict()
    torch.manual_seed(3)
    model = TemporalRwkvForCausalLM.from_rwkv4(
        official_file, n_perspectives=3, placement="stream", perspective_noise=0.1
    )
    for name, rows in model.perspective_parameters():
        if "selector" in name:
            continue
        assert torch.equal(rows[0], base[name]), name
        size = base[name].square().mean().sqrt()
        for row in rows[1:]:
            assert 0.05 * size < (row - base[name]).std() < 0.2 * size, name


def test_equal_perspectives_that_can_not_learn_apart_are_reported(official_file):
    with pytest.warns(UserWarning, match="perspective_noise"):
        TemporalRwkvForCausalLM.from_rwkv4(official_file, n_perspectives=2, aggregation="mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_round_trip_is_bitwise(tmp_path, dtype):
    source = random_official(seed=2, dtype=dtype)
    torch.save(source, tmp_path / "a.pth")
    model = TemporalRwkvForCausalLM.from_rwkv4(tmp_path / "a.pth")
    model.to_rwkv4(tmp_path / "b.pth")
    written = torch.load(tmp_path / "b.pth", weights_only=True)
    for name in source:  # decay and bonus are float32 in the model whatever they were
        if name.endswith(("time_decay", "time_first")):
            assert written[name].dtype == torch.float32
            source[name] = source[name].float()
    assert_same_tensors(written, source)
    assert_same_tensors(
        TemporalRwkvForCausalLM.from_rwkv4(tmp_path / "b.pth").state_dict(), model.state_dict()
    )


def test_round_trip_onto_the_same_file(tmp_path):
    torch.save(random_official(), tmp_path / "a.pth")
    model = TemporalRwkvForCausalLM.from_rwkv4(tmp_path / "a.pth")
    model.to_rwkv4(tmp_path / "folder")
    again = TemporalRwkvForCausalLM.from_rwkv4(tmp_path / "folder")
    again.to_rwkv4(tmp_path / "folder")
    assert_same_tensors(
        TemporalRwkvForCausalLM.from_rwkv4(tmp_path / "folder").state_dict(), model.state_dict()
    )


def test_the_model_outlives_its_file(tmp_path):
    """safetensors maps files into memory: what is written there later must not reach the model."""
    random_hf_model().save_pretrained(tmp_path)
    model = TemporalRwkvForCausalLM.from_rwkv4(tmp_path)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert_same_tensors(model.state_dict(), before)


@pytest.mark.parametrize("tied", [False, True])
def test_hf_round_trip_is_bitwise_and_transformers_reads_it(tmp_path, tokens, tied):
    oracle = random_hf_model(tie_word_embeddings=tied)
    oracle.save_pretrained(tmp_path / "a")
    model = TemporalRwkvForCausalLM.from_rwkv4(tmp_path / "a")
    model.to_rwkv4(tmp_path / "b")
    a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert_same_tensors(a, b)
    again = RwkvForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(logits_of(again, tokens), logits_of(oracle, tokens))
    model.to_rwkv4(tmp_path / "b.pth")
    assert_same_tensors(
        TemporalRwkvForCausalLM.from_rwkv4(tmp_path / "b.pth").state_dict(), model.state_dict()
    )


def test_dtype_is_the_checkpoints_unless_given(tmp_path):
    state = random_official(dtype=torch.float16)
    state["ln_out.weight"] = state["ln_out.weight"].float()  # the one that needs the widest decides
    torch.save(state, tmp_path / "mixed.pth")
    assert TemporalRwkvForCausalLM.from_rwkv4(tmp_path / "mixed.pth").dtype == torch.float32
    state["ln_out.weight"] = state["ln_out.weight"].bfloat16()  # neither holds the other
    torch.save(state, tmp_path / "halves.pth")
    assert TemporalRwkvForCausalLM.from_rwkv4(tmp_path / "halves.pth").dtype == torch.float32
    for dtype in (torch.bfloat16, "bfloat16"):
        model = TemporalRwkvForCausalLM.from_rwkv4(tmp_path / "mixed.pth", dtype=dtype, n_perspectives=2)
        for name, parameter in model.named_parameters():
            wide = name.endswith(("time_decay", "time_first"))
            assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name


@pytest.mark.parametrize("dtype", ["float31", "int8", torch.int8])
def test_wrong_dtypes(official_file, dtype):
    with pytest.raises(ValueError, match="dtype: expected a floating point"):
        TemporalRwkvForCausalLM.from_rwkv4(official_file, dtype=dtype)


def test_more_than_one_perspective_is_no_rwkv4(official_file, tmp_path):
    model = TemporalRwkvForCausalLM.from_rwkv4(official_file, n_perspectives=2)
    with pytest.raises(ValueError, match="one perspective"):
        model.to_rwkv4(tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize("source", ["someone/some-rwkv4", "someone/some-rwkv4/file.pth"])
def test_a_hub_id_without_network_says_what_to_do(monkeypatch, tmp_path, source):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"give the path of a downloaded RWKV-4 checkpoint"):
        read_rwkv4(source)


@pytest.mark.parametrize("form", ["safetensors", "bin", "pth"])
def test_a_hub_id_is_downloaded_without_more_than_needed(monkeypatch, tmp_path, official_file, form):
    from fnmatch import fnmatch

    import huggingface_hub

    remote, local = tmp_path / "remote", tmp_path / "local"
    random_hf_model().save_pretrained(remote)
    torch.save(load_file(remote / "model.safetensors"), remote / "pytorch_model.bin")
    shutil.copy(official_file, remote / "official.pth")
    if form == "bin":
        (remote / "model.safetensors").unlink()

    def snapshot_download(repository, *, allow_patterns, local_files_only):
        assert repository == "someone/rwkv4"
        for file in remote.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                local.mkdir(exist_ok=True)
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = read_rwkv4("someone/rwkv4" + ("/official.pth" if form == "pth" else ""))
    assert checkpoint.settings["hidden_size"] == C
    wanted = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "pth": "official.pth"}
    assert [file.name for file in local.iterdir() if file.suffix != ".json"] == [wanted[form]]
