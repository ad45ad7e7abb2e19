"""What names the state of the CUDA sources: the compiled library carries it and is refused where they differ."""

import hashlib
from pathlib import Path


def fingerprint(folder: Path) -> str:
    """Of the kernels and headers in `folder`. kernels/csrc/build.py reads this file without the package."""
    digest = hashlib.sha256()
    for source in sorted([*folder.glob("*.cu"), *folder.glob("*.h")]):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]
