"""The models of transformers and of trwkv, as `ecosystem.py` tries them: a method per feature.

A trial returns what it found ("yes", or a figure) or raises; a class has no method for what its program has no function
for. A result counts only if the numbers are right: they are compared with transformers' RWKV-4 on the same weights.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import RwkvForCausalLM

from ecosystem_others import RwkvPackage
from ecosystem_setting import DECODED, LAYERS, VOCAB, C, Code, Setting, T, Wrong, drift, same


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
    state_argument = "cache"

    def __init__(self, setting: Setting) -> None:
        from trwkv.models import TemporalRwkvForCausalLM

        self.cls = TemporalRwkvForCausalLM
        super().__init__(setting)

    def load(self, source: Path, **options: Any) -> Any:
        return self.cls.from_rwkv4(source, **options)

    def wkv_state(self, output: Any) -> Tensor:
        return output.cache.layers[0].wkv

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
        model, tokens = self.load(self.setting.folder / "hf"), self.setting.tokens[:1]
        packed = self.logits(model, tokens, cu_seqlens=torch.tensor([0, 7, T]))
        return same(
            packed, torch.cat([self.logits(model, piece) for piece in tokens.split([7, T - 7], 1)], 1)
        )

    def perspectives(self) -> str:
        model = self.load(self.setting.folder / "hf", n_perspectives=3)
        return same(self.logits(model, self.setting.tokens), self.setting.logits)
