"""Which implementation of the operators runs. Chosen once per process by the caller, never switched silently."""

BACKENDS = ("torch",)


def available_backends() -> tuple[str, ...]:
    """Names that `resolve` accepts on this machine."""
    return BACKENDS


def resolve(name: str) -> str:
    """Turns `auto` into the fastest available backend and checks any other name.

    Raises:
        ValueError: if `name` is not available here; the message lists what is.
    """
    if name == "auto":
        return BACKENDS[-1]
    if name not in BACKENDS:
        raise ValueError(f"backend `{name}` must be one of {', '.join(('auto', *BACKENDS))} on this machine")
    return name
