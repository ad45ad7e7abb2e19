"""A private copy of code and configuration in the folder of a run: a job runs what it was submitted with.

RUN/slurm/3f6c0a1b2c4d/{pretrain, finetune, kernels/parlance_kernels, config.yaml}
"""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pretrain", "finetune", "kernels/parlance_kernels")


def code() -> dict[str, bytes]:
    """{path below the checkout: content} of every file that training may import or load."""
    return {
        str(path.relative_to(ROOT)): path.read_bytes()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def fingerprint(files: Mapping[str, bytes]) -> str:
    """12 hex digits that stand for names and contents."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Makes `folder` with `files`, whole or not at all; one that is there is left as it is."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files.items():
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        staging.chmod(0o755)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
