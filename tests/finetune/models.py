"""Small random models and sources for the decoding tests."""

from typing import Any

import numpy as np
import torch

from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder, SourceRows, SpecialIds

IDS = SpecialIds(bos=0, pad=1, eos=2, mask=4, unk=3)
SPECIAL = (0, 1, 2, 3, 4)


def tiny_model(vocab: int = 40, seed: int = 0, **changes: Any) -> EncoderDecoder:
    """float64, eval mode, weights large enough for distinct decisions."""
    options: dict[str, Any] = {
        "vocab_size": vocab, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "heads": 2, "ffn_dim": 32,
        "max_positions": 64, "length_classes": 32, "init_std": 0.5,
    }  # fmt: skip
    torch.manual_seed(seed)
    return EncoderDecoder(ModelConfig(**{**options, **changes}), IDS, backend="torch").double().eval()


def some_sources(lengths: tuple[int, ...] = (3, 8, 5, 5, 12), vocab: int = 40, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.array([IDS.bos, *rng.integers(5, vocab, size=n), IDS.eos]) for n in lengths]


def pack(sources: list[np.ndarray], numbers: list[int] | None = None) -> SourceRows:
    return SourceRows.pack(sources, numbers)
