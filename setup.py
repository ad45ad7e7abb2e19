"""Installs the one library package, `parlance_kernels`, and everything the two applications need.

`kernels/` plays the role of `src/`; `pretrain/` and `finetune/` run from the checkout root and are not installed.
torch is never imported here, so that building needs nothing but setuptools.
"""

from setuptools import find_packages, setup

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

setup(
    name="parlance",
    version="0.1.0",
    description="Pre-training of encoder-decoder language models that write text in parallel",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "kernels"},
    packages=find_packages("kernels", include=["parlance_kernels*"]),
    package_data={"parlance_kernels": ["py.typed"]},
    install_requires=INSTALL,
    extras_require={
        "dev": DEVELOP,
        "bench": PEERS,
        "meteor": METEOR,
        "apex": ["apex @ git+https://github.com/NVIDIA/apex"],
    },
)
