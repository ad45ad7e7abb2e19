"""Parts of NVIDIA's apex, where it is installed; the package of that name on PyPI is something else."""

from importlib import import_module
from typing import Any

from pretrain.errors import ConfigError


def part(path: str, asked: str, instead: str) -> Any:
    """What lies at `path` in apex, as `optimizers.FusedAdam`. asked, instead: what a user chose, and could choose.

    Raises:
        ConfigError: apex is not there or was built without that part, or it is the other package.
    """
    folder, name = path.rsplit(".", 1)
    try:
        apex = import_module("apex")
        found = getattr(import_module(f"apex.{folder}"), name, None) if hasattr(apex, "__path__") else None
    except ImportError as error:
        raise ConfigError(f"{asked} needs NVIDIA's apex, got: {error}; take {instead}") from None
    if found is None:
        raise ConfigError(
            f"{asked} needs NVIDIA's apex, got a package of that name without {path} ({apex.__file__}); take {instead}"
        )
    return found
