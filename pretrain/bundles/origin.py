"""Where a bundle comes from, by its provenance: only a bundle of the same origin takes the place of another."""

from collections.abc import Mapping
from typing import Any

from pretrain.flatten import flatten

# What two runs of one name cannot differ in if they are one.
OF_A_RUN = ("seed", "init_from", "model", "objective")


def origin(provenance: Mapping[str, Any]) -> str:
    """`run `janus``, `the tuned run `ar`` or `the import of `facebook/bart-base``, for messages."""
    if "imported_from" in provenance:
        return f"the import of `{provenance['imported_from']!s:.200}`"
    if "run" not in provenance:
        return "unknown origin"
    return f"{'the tuned ' if 'tuned_from' in provenance else ''}run `{provenance['run']!s:.100}`"


def other_origin(standing: Mapping[str, Any], coming: Mapping[str, Any]) -> str | None:
    """None where both provenances are of one run or source; else what differs besides `origin`, perhaps nothing.

    A later step of the same run has the same origin. So have two imports from one place, or of the same files. A tuned
    run writes into its own folder, where its name is enough.
    """
    if "imported_from" in standing and "imported_from" in coming:
        same = any(standing.get(key) == coming[key] for key in ("imported_from", "files") if key in coming)
        return None if same else ""
    if origin(standing) != origin(coming):
        return ""
    if "tuned_from" in coming:
        return None
    was, now = _identity(standing), _identity(coming)
    # An option that only one of them has is newer than the other.
    changed = [key for key in was.keys() & now.keys() if was[key] != now[key]]
    return f" with another `{min(changed, key=lambda key: (not key.endswith('.name'), key))}`" if changed else None


def _identity(provenance: Mapping[str, Any]) -> dict[str, Any]:
    config, data = provenance.get("config"), provenance.get("data")
    values = {key: config.get(key) for key in OF_A_RUN} if isinstance(config, Mapping) else {}
    of_data = {key: data.get(key) for key in ("index_sha256", "tokenizer_sha256")} if isinstance(data, Mapping) else {}
    return flatten({**values, "data": of_data})
