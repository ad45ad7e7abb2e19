"""Parlance's operators: what a row may see (`SampleMask`), attention under it, early exits, what
an early exit asks of logits, and the fused vocabulary loss.

Every operator has its definition in `reference.py` beside `op.py`; tests hold them equal. The backend is
chosen once by `backend.resolve` and passed explicitly: there is no silent fallback.
"""

from parlance_kernels.backend import available_backends, resolve
from parlance_kernels.exit_copy.op import exit_copy
from parlance_kernels.offramp_stats.op import offramp_stats
from parlance_kernels.sample_attention.mask import SampleMask
from parlance_kernels.sample_attention.op import sample_attention
from parlance_kernels.vocab_loss.op import vocab_loss
from parlance_kernels.vocab_part import VocabPart

__all__ = [
    "SampleMask",
    "VocabPart",
    "available_backends",
    "exit_copy",
    "offramp_stats",
    "resolve",
    "sample_attention",
    "vocab_loss",
]
