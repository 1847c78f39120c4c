"""The `rwkv` package and flash-linear-attention, as `ecosystem.py` tries them; see `ecosystem_models.py`."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecosystem_setting import DECODED, VOCAB, C, Code, Setting, T, Wrong, drift, same


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
