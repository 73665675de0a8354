"""What the server of forks.py imports and computes once, for all the processes that it forks."""

import os

# Triton reads it when it is imported. Where the tests hide the GPUs (conftest.py), kernels are interpreted, and
# compiled in another Python; gpu_checks.py has a server of its own.
if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    os.environ["TRITON_INTERPRET"] = "1"

# torchao, where it is installed, asks for GPUs when it is imported: without this no fork could use them then.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

# The hub's client, the peers of tools/diff_open_instruct.py, and what torch imports with AdamW's first step.
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import pytest  # noqa: F401
import scipy.io  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import trl.trainer.dpo_trainer  # noqa: F401
import world  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import data

# Kept: each run would hash the code again, half of the CPU time of four steps.
data._token_code()
