"""Installs the one library package, `parlance_kernels`, and everything the two applications need.

`kernels/` plays the role of `src/`; `pretrain/` and `finetune/` run from the checkout root and are not installed.
torch is never imported here, so that building needs nothing but setuptools.

Where nvcc is and a GPU can run its work, installing compiles the CUDA kernels, too. Without a GPU it does so only if
PARLANCE_CUDA_ARCHS names targets (an image for other machines); `make kernels` always does.
"""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "kernels" / "csrc" / "build.py"

INSTALL = [
    "torch>=2.6,<2.14",
    "deepspeed>=0.19,<0.20",
    "megatron-core>=0.16,<0.17; python_version < '3.12'",
    "megatron-core>=0.16,<0.18; python_version >= '3.12'",
    "datasets>=4,<6",
    "webdataset>=1.0,<1.1",
    "tensorboard>=2.18,<3",
    "transformers>=5,<6",
    "huggingface_hub>=1,<3",
    "pyarrow>=17,<28",
    "tokenizers>=0.22,<0.24",
    "safetensors>=0.5,<1",
    "numpy>=1.26,<3",
    "pydantic>=2.7,<3",
    "PyYAML>=6,<7",
    "tqdm>=4.66,<5",
    "psutil>=5.9,<8",
    "pillow>=10,<14",
    "matplotlib>=3.9,<4",
    "packaging>=22,<28",
    "rouge-score>=0.1.2,<0.2",
    "sacrebleu>=2.4,<3",
    "nltk>=3.9,<4",
]
DEVELOP = [
    "pytest>=8,<10",
    "pytest-timeout>=2.3,<3",
    "pytest-xdist>=3.5,<4",
    "hypothesis>=6.100,<7",
    "ruff>=0.6,<1",
    "mypy>=1.11,<3",
    "import-linter>=2,<3",
    "types-PyYAML",
    "types-psutil",
    "types-tqdm",
]

# What `make bench` compares with, and nothing else needs.
PEERS = ["ctranslate2>=4.5,<5"]

# METEOR 1.5 with its jar, 100 MB; Java must be there.
METEOR = ["pycocoevalcap>=1.2,<2"]


def wants_kernels() -> bool:
    """Whether installing here compiles the kernels."""
    return bool(os.environ.get("PARLANCE_CUDA_ARCHS")) or Path("/proc/driver/nvidia/version").exists()


class BuildWithKernels(build_py):
    """The Python files, and the compiled kernels beside them; in an editable install that is the checkout."""

    def run(self) -> None:
        super().run()
        if not wants_kernels():
            print("parlance: no NVIDIA driver here, so no CUDA kernels; the torch backend needs none (`make kernels`)")
            return
        build = runpy.run_path(str(BUILD))
        folder = ROOT / "kernels" if self.editable_mode else Path(self.build_lib)
        try:
            print(f"parlance: CUDA kernels in {build['build'](folder / 'parlance_kernels')}")
        except build["BuildError"] as error:
            if os.environ.get("PARLANCE_CUDA_ARCHS"):
                raise SystemExit(f"parlance: PARLANCE_CUDA_ARCHS asks for CUDA kernels: {error}") from None
            print(f"parlance: no CUDA kernels, the torch backend needs none: {error}")


class WithKernels(Distribution):
    """A wheel with compiled kernels belongs to one platform."""

    def has_ext_modules(self) -> bool:
        return wants_kernels()


setup(
    name="parlance",
    version="0.1.0",
    description="Pre-training of encoder-decoder language models that write text in parallel",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "kernels"},
    packages=find_packages("kernels", include=["parlance_kernels*"]),
    package_data={"parlance_kernels": ["py.typed"]},
    cmdclass={"build_py": BuildWithKernels},
    distclass=WithKernels,
    install_requires=INSTALL,
    extras_require={
        "dev": DEVELOP,
        "bench": PEERS,
        "meteor": METEOR,
        "apex": ["apex @ git+https://github.com/NVIDIA/apex"],
    },
)
