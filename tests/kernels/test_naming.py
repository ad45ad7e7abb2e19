"""`kernels/` is a source folder, not a package: it must never shadow Hugging Face's package of that name."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_is_not_importable_as_ours():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import sys; from transformers import BartConfig, BartForConditionalGeneration;"
        "assert not any(m.startswith('parlance') for m in sys.modules);"
        "BartForConditionalGeneration(BartConfig(vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1,"
        "encoder_ffn_dim=8, decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_nothing_happens_at_import():
    code = (
        "import sys, pretrain, finetune, pretrain.errors, pretrain.config;"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
