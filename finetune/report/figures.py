"""The pictures of a report: what its texts are worth, and how training went."""

from collections.abc import Sequence

from finetune.charts import Curve, Panel, Plane
from finetune.report.measured import Measured
from finetune.report.record import LOSS, VALID, Record

Series = tuple[str, str]  # (run, mode)
UPDATES, SECONDS = "updates", "device-seconds of updates"


def looks(measured: Sequence[Measured]) -> dict[Series, int]:
    """A look for each mode of each run, the same in every picture."""
    return {series: number for number, series in enumerate(dict.fromkeys(_series(one) for one in measured))}


def quality(measured: Sequence[Measured], metric: str) -> list[Panel | Plane]:
    """Quality against latency; by iterations, where there are some; where tokens left, if they did early."""
    numbers = looks(measured)
    unit = f"{metric}, {unit_of(metric)}"
    latency = "ms a sentence, batch 1: median"
    curves = []
    for series, number in numbers.items():
        mine = [one for one in measured if _series(one) == series]
        points = [(one.milliseconds, one.scores.values[metric]) for one in mine]
        curves.append(Curve(_named(series, measured), points, number, [_short(one) for one in mine]))
    panels: list[Panel | Plane] = [
        Plane(f"{metric} against latency (better: up, left)", latency, unit, curves, log_x=True)
    ]
    iterated = {series: [one for one in measured if _series(one) == series] for series in numbers if series[1] == "nar"}
    if any(len(mine) > 1 for mine in iterated.values()):
        for name in (metric, "repetition"):
            curves = [
                Curve(_named(series, measured), [(_iterations(one), one.scores.values[name]) for one in mine], number)
                for series, mine in iterated.items()
                for number in [numbers[series]]
            ]
            title = f"{name} by iterations" if name == metric else "words equal to the one before, by iterations"
            panels.append(Plane(title, "refinements after the first pass", unit_of(name), curves))
    left = [(one, one.exits.shares) for one in measured if one.exits]
    if left:
        layers = range(max(len(shares) for _, shares in left))
        shares_of = {
            f"layer {layer + 1}": [100 * shares[layer] if layer < len(shares) else 0.0 for _, shares in left]
            for layer in layers
        }
        names = [f"{_named(_series(one), measured)} {one.way.label}" for one, _ in left]
        panels.append(Panel("tokens by the layer they left, %", names, shares_of, "stacked"))
    return panels


def training(records: Sequence[Record], measured: Sequence[Measured], metric: str) -> list[Panel | Plane]:
    """Scores of validation texts against updates and against cost, where they were measured; losses of each run."""
    numbers = dict(looks(measured))
    for record in records:
        for mode in record.scores(metric):
            numbers.setdefault((record.name, mode), len(numbers))
    panels: list[Panel | Plane] = []
    scored = [(record, mode, curve) for record in records for mode, curve in record.scores(metric).items()]
    if scored:
        for along in (UPDATES, SECONDS):
            curves = [
                Curve(
                    _named((record.name, mode), measured),
                    [(step if along == UPDATES else record.cost.until(step), value) for step, value in curve],
                    numbers[record.name, mode],
                )
                for record, mode, curve in scored
            ]
            panels.append(Plane(f"validation {metric} against {along}", along, unit_of(metric), curves))
    for record in records:
        seen, held = record.losses(LOSS), record.losses(VALID)
        curves = [Curve(term, curve, number, marked=False) for number, (term, curve) in enumerate(seen.items())]
        curves += [Curve("", held[term], number, dashed=True) for number, term in enumerate(seen) if term in held]
        if curves:
            panels.append(Plane(f"losses of {record.name}", UPDATES, "nats; dashed: validation", curves))
    return panels


def unit_of(metric: str) -> str:
    """What its values are."""
    return "ratio" if metric == "length_ratio" else "%"


def _series(one: Measured) -> Series:
    return one.way.record.name, one.way.mode


def _named(series: Series, measured: Sequence[Measured]) -> str:
    """The mode alone where there is one run."""
    run, mode = series
    return f"{run}: {mode}" if len({one.way.record.name for one in measured}) > 1 else mode


def _iterations(one: Measured) -> float:
    return float(one.way.options["iterations"])


def _short(one: Measured) -> str:
    """The setting, as short as a picture needs it."""
    return f"{one.way.options['iterations']} it." if one.way.mode == "nar" else one.way.label
