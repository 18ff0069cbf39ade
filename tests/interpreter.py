"""Without a GPU the Triton kernels are interpreted. To be imported before Triton is, which reads this only once."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
