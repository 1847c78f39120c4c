"""The programs that `ecosystem.py` tries, and how: a method per feature, the same names in every class.

A trial returns what it found ("yes", or a figure) or raises; a class has no method for what its program has no function
for. A result counts only if the numbers are right: they are compared with transformers' RWKV-4 on the same weights.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import RwkvConfig, RwkvForCausalLM

VOCAB, C, LAYERS, T = 61, 32, 2, 24
TOLERANCE = 1e-4
DECODED = 512


class Wrong(Exception):
    """It ran, and the result is not what it should be."""


def same(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> str:
    if not torch.equal(torch.isfinite(got), torch.isfinite(expected)):
        raise Wrong("not finite")
    error = (got.float() - expected.float()).abs().max().item() / expected.abs().max().item()
    if error > tolerance:
        raise Wrong(f"the result is off by {100 * error:.2g} %")
    return "yes"


def drift(got: Tensor, expected: Tensor, dtype: torch.dtype | None) -> str:
    error = (got - expected).norm() / expected.norm()
    return f"off by {100 * error.item():.2g} %, sums in {str(dtype).removeprefix('torch.')}"


class Setting(SimpleNamespace):
    """Weights in every format, tokens, and what transformers' model makes of them."""

    def __init__(self, folder: Path) -> None:
        from trwkv.models import TemporalRwkvForCausalLM

        torch.manual_seed(0)
        config = RwkvConfig(vocab_size=VOCAB, hidden_size=C, num_hidden_layers=LAYERS, rescale_every=0)
        model = RwkvForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder / "hf")
        ours = TemporalRwkvForCausalLM.from_rwkv4(folder / "hf")
        for name in ("official.pth", "rwkv.cpp.bin"):
            ours.to_rwkv4(folder / name)
        tokens = torch.randint(0, VOCAB, (2, T))
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        gradient = model.rwkv.blocks[0].attention.time_decay.grad
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
        super().__init__(folder=folder, model=model, tokens=tokens, logits=logits, gradient=gradient)


class Code:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


class HuggingFaceModel:
    """What is tried alike on transformers' model and on ours."""

    cls: Any
    state_argument: str
    wkv_state: Any

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.model = self.load(setting.folder / "hf")

    def load(self, source: Path, **options: Any) -> Any:
        return self.cls.from_pretrained(source, **options).eval()

    def logits(self, model: Any, *arguments: Any, **options: Any) -> Tensor:
        with torch.no_grad():
            return model(*arguments, **options).logits

    def reads(self, name: str) -> str:
        model = self.load(self.setting.folder / name)
        return same(self.logits(model, self.setting.tokens, use_cache=False), self.setting.logits)

    def load_official(self) -> str:
        return self.reads("official.pth")

    def load_hf(self) -> str:
        return self.reads("hf")

    def load_rwkv_cpp(self) -> str:
        return self.reads("rwkv.cpp.bin")

    def write_hf(self) -> str:
        self.model.save_pretrained(self.setting.folder / "written")
        again = RwkvForCausalLM.from_pretrained(self.setting.folder / "written").eval()
        return same(self.logits(again, self.setting.tokens, use_cache=False), self.setting.logits)

    def padding(self, left: bool) -> str:
        """The second sequence of a batch is shorter."""
        tokens, mask, n = self.setting.tokens.clone(), torch.ones(2, T, dtype=torch.long), T - 7
        place = slice(T - n, T) if left else slice(0, n)
        tokens[1], mask[1] = 0, 0
        tokens[1, place], mask[1, place] = self.setting.tokens[1, :n], 1
        return same(
            self.logits(self.model, tokens, attention_mask=mask)[1, place], self.setting.logits[1, :n]
        )

    def left_padding(self) -> str:
        return self.padding(True)

    def right_padding(self) -> str:
        return self.padding(False)

    def beam_search(self) -> str:
        options = {
            "num_beams": 4,
            "max_new_tokens": 24,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        plain, cached = (
            self.model.generate(self.setting.tokens, use_cache=use_cache, **options)
            for use_cache in (False, True)
        )
        if not torch.equal(plain, cached):
            raise Wrong("the beams differ from those without a state")
        return "yes"

    def continue_from_state(self) -> str:
        first = self.model(self.setting.tokens[:, :11], use_cache=True)
        state = {self.state_argument: getattr(first, self.state_argument)}
        rest = self.logits(self.model, self.setting.tokens[:, 11:], use_cache=True, **state)
        return same(rest, self.setting.logits[:, 11:])

    def bf16_decoding(self) -> str:
        """The last of many tokens, decoded one by one in bfloat16, against float32 with the same weights."""
        half = self.load(self.setting.folder / "hf", dtype=torch.bfloat16)
        exact = self.load(self.setting.folder / "hf")
        exact.load_state_dict({name: x.float() for name, x in half.state_dict().items()})
        tokens = torch.randint(0, VOCAB, (1, DECODED), generator=torch.Generator().manual_seed(1))
        last, dtype = [], None
        for model in (half, exact):
            state = {}
            for t in range(DECODED):
                with torch.no_grad():
                    output = model(tokens[:, t : t + 1], use_cache=True, **state)
                state = {self.state_argument: getattr(output, self.state_argument)}
                dtype = self.wkv_state(output).dtype if model is half else dtype
            last.append(output.logits[0, -1].float())
        return drift(*last, dtype)

    def train_on_cpu(self) -> str:
        self.model.train()
        self.model.zero_grad()
        self.model(self.setting.tokens, labels=self.setting.tokens, use_cache=False).loss.backward()
        self.model.eval()
        gradient = next(x.grad for name, x in self.model.named_parameters() if name.endswith("time_decay"))
        return same(gradient, self.setting.gradient)

    def lm_eval(self) -> str:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        from trwkv.synthetic import byte_tokenizer

        class Bytes(HFLM):
            def tok_encode(self, string: str, **options: Any) -> list[int]:
                return [ord(letter) % VOCAB for letter in string]

        model = Bytes(pretrained=self.model, backend="causal", tokenizer=byte_tokenizer())
        request = Instance("loglikelihood", {}, ("abc", "de"), 0)
        ((score, _),) = model.loglikelihood([request], disable_tqdm=True)
        ids = torch.tensor([model.tok_encode("abcde")])
        expected = self.setting.model(ids).logits.log_softmax(-1)[0, [2, 3], ids[0, 3:]].sum()
        return same(torch.tensor(score), expected.detach())

    def peft(self) -> str:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(target_modules=["key", "receptance"], r=2)
        model = get_peft_model(self.load(self.setting.folder / "hf"), config)
        same(self.logits(model, self.setting.tokens, use_cache=False), self.setting.logits)
        model(input_ids=self.setting.tokens, labels=self.setting.tokens, use_cache=False).loss.backward()
        gradients = [x.grad for x in model.parameters() if x.requires_grad]
        return "yes" if gradients and all(x is not None for x in gradients) else "no: no gradients"

    def compile(self) -> str:
        compiled = torch.compile(self.model, fullgraph=True, backend="aot_eager")
        return same(self.logits(compiled, self.setting.tokens, use_cache=False), self.setting.logits)

    def export(self) -> str:
        program = torch.export.export(self.model, (self.setting.tokens,), {"use_cache": False})
        return same(program.module()(self.setting.tokens, use_cache=False).logits, self.setting.logits)

    def refuses_code(self) -> str:
        trace, folder = self.setting.folder / f"{type(self).__name__} ran it", self.setting.folder / "evil"
        folder.mkdir(exist_ok=True)
        self.setting.model.config.save_pretrained(folder)
        torch.save({"x": Code(trace)}, folder / "pytorch_model.bin")
        try:
            self.load(folder)
        except Exception:
            pass
        else:
            raise Wrong("no error")
        return "yes" if not trace.exists() else "no: the code was run"


class Transformers(HuggingFaceModel):
    cls, state_argument = RwkvForCausalLM, "state"

    def wkv_state(self, output: Any) -> Tensor:
        return output.state[2]

    def state_gradient(self) -> str:
        state = [torch.zeros(2, C, LAYERS, requires_grad=True) for _ in range(5)]
        self.model(self.setting.tokens, state=state, use_cache=True).logits.sum().backward()
        return "yes" if all(x.grad is not None for x in state) else "no: no gradient"


class Trwkv(HuggingFaceModel):
    state_argument = "past_key_values"

    def __init__(self, setting: Setting) -> None:
        from trwkv.models import TemporalRwkvForCausalLM

        self.cls = TemporalRwkvForCausalLM
        super().__init__(setting)

    def load(self, source: Path, **options: Any) -> Any:
        return self.cls.from_rwkv4(source, **options)

    def wkv_state(self, output: Any) -> Tensor:
        return output.past_key_values.layers[0].wkv

    def written(self, name: str) -> Any:
        self.model.to_rwkv4(self.setting.folder / name)
        return self.setting.folder / name

    def write_hf(self) -> str:
        again = RwkvForCausalLM.from_pretrained(self.written("ours")).eval()
        return same(self.logits(again, self.setting.tokens, use_cache=False), self.setting.logits)

    def write_official(self) -> str:
        return RwkvPackage.reads(self.written("ours.pth"), self.setting)

    def write_rwkv_cpp(self) -> str:
        return self.reads(self.written("ours.bin").name)

    def state_gradient(self) -> str:
        from trwkv.ops import multi_perspective_wkv

        w, u, k, v = -torch.rand(C), torch.randn(C), *torch.randn(2, 2, T, C)
        state, gradients = torch.rand(2, 3, C).requires_grad_(), []
        for backend in ("torch", "reference"):
            y, _ = multi_perspective_wkv(w, u, k, v, initial_state=state, backend=backend)
            gradients += torch.autograd.grad(y.sum(), state)
        return same(*gradients) + " (the op)"

    def packed(self) -> str:
        from trwkv.ops import multi_perspective_wkv

        w, u, k, v = -torch.rand(1, C), torch.randn(1, C), *torch.randn(2, 1, T, C)
        bounds = torch.tensor([0, 7, T])
        apart = [multi_perspective_wkv(w, u, k[:, a:b], v[:, a:b])[0] for a, b in ((0, 7), (7, T))]
        return (
            same(multi_perspective_wkv(w, u, k, v, cu_seqlens=bounds)[0], torch.cat(apart, 1)) + " (the op)"
        )

    def perspectives(self) -> str:
        model = self.load(self.setting.folder / "hf", n_perspectives=3)
        return same(self.logits(model, self.setting.tokens), self.setting.logits)


class RwkvPackage:
    """The `rwkv` package (ChatRWKV's inference)."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.model = self.load(setting.folder / "official.pth")

    @staticmethod
    def load(path: Path, strategy: str = "cpu fp32") -> Any:
        os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
        from rwkv.model import RWKV

        return RWKV(model=str(path), strategy=strategy, verbose=False)

    @staticmethod
    def logits(model: Any, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return model.forward(tokens.tolist(), state, full_output=True)

    @classmethod
    def reads(cls, path: Path, setting: Setting) -> str:
        return same(cls.logits(cls.load(path), setting.tokens[0])[0], setting.logits[0])

    def load_official(self) -> str:
        return self.reads(self.setting.folder / "official.pth", self.setting)

    def load_hf(self) -> str:
        return self.reads(self.setting.folder / "hf", self.setting)

    def load_rwkv_cpp(self) -> str:
        return self.reads(self.setting.folder / "rwkv.cpp.bin", self.setting)

    def left_padding(self) -> str:
        self.logits(self.model, self.setting.tokens)
        return "a batch was accepted"

    right_padding = left_padding

    def continue_from_state(self) -> str:
        _, state = self.logits(self.model, self.setting.tokens[0, :11])
        return same(
            self.logits(self.model, self.setting.tokens[0, 11:], state)[0], self.setting.logits[0, 11:]
        )

    def bf16_decoding(self) -> str:
        half = self.load(self.setting.folder / "official.pth", "cpu bf16")
        exact = self.load(self.setting.folder / "official.pth")
        for name, x in half.w.items():
            exact.w[name] = x.float() if x.is_floating_point() else x
        tokens = torch.randint(0, VOCAB, (DECODED,), generator=torch.Generator().manual_seed(1)).tolist()
        results, dtype = [], None
        for model in (half, exact):
            state = None
            for token in tokens:
                logits, state = model.forward([token], state)
            results.append(logits.float())
            dtype = (
                state[2].dtype if model is half else dtype
            )  # of the first layer: shift, sums, maximum, shift
        return drift(*results, dtype)

    def train_on_cpu(self) -> str:
        self.model.w["emb.weight"].requires_grad_()
        logits, _ = self.logits(self.model, self.setting.tokens[0])
        if not logits.requires_grad:
            raise Wrong("the result has no gradient")
        return "yes"

    state_gradient = train_on_cpu

    def compile(self) -> str:
        forward = torch.compile(self.model.forward, fullgraph=True, backend="aot_eager")
        return same(
            forward(self.setting.tokens[0].tolist(), None, full_output=True)[0], self.setting.logits[0]
        )

    def export(self) -> str:
        arguments = self.setting.tokens[0].tolist(), None, True
        return same(
            torch.export.export(self.model, arguments).module()(*arguments)[0], self.setting.logits[0]
        )

    def peft(self) -> str:
        from peft import LoraConfig, get_peft_model

        get_peft_model(self.model, LoraConfig(target_modules=["key", "receptance"], r=2))
        return "yes"

    def refuses_code(self) -> str:
        trace = self.setting.folder / "rwkv ran it"
        torch.save({"x": Code(trace)}, self.setting.folder / "evil.pth")
        try:
            self.load(self.setting.folder / "evil.pth")
        except Exception:
            pass
        else:
            raise Wrong("no error")
        return "yes" if not trace.exists() else "no: the code was run"


class FlashLinearAttention:
    """Its op; it has no RWKV-4 model. Without a GPU its kernels can run in Triton's interpreter alone."""

    def __init__(self, setting: Setting) -> None:
        from fla.ops.rwkv4 import fused_recurrent_rwkv4

        self.op = fused_recurrent_rwkv4

    def compare(self, parts: int = 1, wanted: str = "") -> str:
        """In so many pieces, the state handed on; the output, or the gradient of `wanted`."""
        from trwkv.ops import multi_perspective_wkv

        g = torch.Generator().manual_seed(0)
        inputs = {"w": torch.randn(C, generator=g), "u": torch.randn(C, generator=g)}
        inputs |= {name: torch.randn(2, T, C, generator=g) for name in "kv"}
        inputs["state"] = torch.rand(2, 3, 1, C, generator=g)
        results = []
        for op in ("theirs", "ours"):
            w, u, k, v, state = leaves = [x.clone().requires_grad_() for x in inputs.values()]
            outputs = []
            for k_part, v_part in zip(k.chunk(parts, 1), v.chunk(parts, 1), strict=True):
                if op == "theirs":
                    y, state = self.op(w, u, k_part, v_part, state)
                else:
                    y, state = multi_perspective_wkv(
                        -torch.exp(w), u, k_part, v_part, initial_state=state.view(2, 3, C),
                        output_final_state=True, backend="reference",
                    )  # fmt: skip
                outputs.append(y)
            y = torch.cat(outputs, 1)
            if wanted:
                y.sum().backward()
            results.append(leaves[list(inputs).index(wanted)].grad if wanted else y.detach())
        return same(*results) + " (the op)"

    def continue_from_state(self) -> str:
        return self.compare(parts=3)

    def train_on_cpu(self) -> str:
        return self.compare(wanted="w")

    def state_gradient(self) -> str:
        return self.compare(wanted="state")
