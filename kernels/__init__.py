"""The kernels that other modules may use.

reference.py is the specification, in plain PyTorch; beside it are the fast paths.
"""

from kernels.adamw import adamw
from kernels.attention import attention, attention_path
from kernels.block import rms_norm
from kernels.logps import segment_sums, token_logps
from kernels.masters import Master, is_split
from kernels.reference import IGNORE_INDEX, SharedPrefix, join_master, split_master

__all__ = [
    "IGNORE_INDEX",
    "Master",
    "SharedPrefix",
    "adamw",
    "attention",
    "attention_path",
    "is_split",
    "join_master",
    "rms_norm",
    "segment_sums",
    "split_master",
    "token_logps",
]
