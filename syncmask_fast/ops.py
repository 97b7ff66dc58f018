"""The fused operators, each with its plain PyTorch reference: the public face of kernels/ and csrc/.

Importing this module imports torch (and triton where present) and nothing else that is heavy.
"""

from syncmask_fast.kernels.group_semi_hard import group_semi_hard, group_semi_hard_reference
from syncmask_fast.kernels.mine_semi_hard import mine_semi_hard, mine_semi_hard_reference
from syncmask_fast.kernels.sync_mask import (
    PATCH_SCORES,
    TOKEN_SCORES,
    SyncMask,
    attention_summary,
    masked_patches,
    sync_mask,
    sync_mask_reference,
)

__all__ = [
    "PATCH_SCORES",
    "TOKEN_SCORES",
    "SyncMask",
    "attention_summary",
    "group_semi_hard",
    "group_semi_hard_reference",
    "masked_patches",
    "mine_semi_hard",
    "mine_semi_hard_reference",
    "sync_mask",
    "sync_mask_reference",
]
