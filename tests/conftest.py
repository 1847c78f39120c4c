"""Set before any kernel is imported: without a GPU, Triton's kernels run in its interpreter."""

import importlib.util
import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

if not HAS_GPU and importlib.util.find_spec("triton"):
    from trwkv.testing import fuse_interpreted_multiply_add

    fuse_interpreted_multiply_add()
