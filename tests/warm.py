"""What the fork server of world.py imports and computes once, for all the runs that it forks."""

import pytest  # noqa: F401
import scipy.io  # noqa: F401  with AdamW's first step
import torch._dynamo  # noqa: F401  likewise
import torch.distributed.fsdp  # noqa: F401
import world  # noqa: F401

import data

data._token_code()  # kept; each run would hash the code again, half of the CPU time of four steps
