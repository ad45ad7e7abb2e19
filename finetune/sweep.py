"""`sweep-threshold`: what a threshold buys and costs, as Figure 2 of ELMER asks.

The same sources are written one at a time, as the papers time it, each at all thresholds in turn, so that other work on
the machine slows none of them more than the others. References are read after all of that. Operations are products of
matrices alone, of decoder and off-ramps: each off-ramp that is asked projects its rows onto the whole vocabulary, and
that is counted. The encoder costs the same at any threshold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from finetune import runners
from finetune.charts import Panel, draw
from finetune.decoding import Exits
from finetune.generate import Written, check_mode, device_named, write_texts
from finetune.partial import check_place
from finetune.scores import score
from finetune.tasks.pairs import Files, read_pairs
from pretrain.bundles.bundle import check_outside, load_bundle
from pretrain.errors import UsageError

METRICS = ("rouge1", "rouge2", "rougeL")
WARM_UP = 2  # sentences before the first clock: libraries plan for shapes that are new to them


@dataclass(frozen=True)
class Point:
    """One threshold. scores: {metric: percent}. milliseconds: median sentence, encoder and decoder, alone."""

    threshold: float
    scores: Mapping[str, float]
    exits: Exits
    sentences: int
    milliseconds: float

    @property
    def gigaflops(self) -> float:
        """Of the decoder with its off-ramps, a sentence."""
        return self.exits.flops / self.sentences / 1e9

    @property
    def ramp_share(self) -> float:
        """Share of these that are projections onto the vocabulary."""
        return self.exits.ramp_flops / self.exits.flops


def sweep_threshold(
    bundle_path: str,
    data: Files,
    thresholds: Sequence[float],
    picture: str,
    options: Mapping[str, Any],
    sentences: int | None = None,
    device: str = "auto",
) -> list[Point]:
    """Writes every source at every threshold, prints a table and draws it to `picture`, a PNG.

    Args:
        data: a TSV file of pairs, or two parallel files.
        options: of `HardExitDecoding`, without its threshold.
        sentences: how many of the pairs; None: all.

    Raises:
        UsageError: the bundle does not write by hard exit with these options, or `picture` is no place for a file.
        CheckpointError, ConfigError, DataError: a bad bundle, option or input.
    """
    _check(Path(picture), data)
    bundle = load_bundle(bundle_path)
    description = bundle.description
    check_mode(description, bundle_path, "hard_exit", options)
    decodings = [{**options, "threshold": threshold} for threshold in thresholds]
    ways = [runners.way("hard_exit", decoding, description) for decoding in decodings]
    pairs = read_pairs(data, "--data")[:sentences]
    model = bundle.model.to(device_named(device))
    sources, longest = [pair.source for pair in pairs], description.longest_source
    for source in sources[:WARM_UP]:
        write_texts(model, bundle.tokenizer, ways[0], [source], longest)
    written = [[write_texts(model, bundle.tokenizer, way, [source], longest) for way in ways] for source in sources]
    targets = [pair.target for pair in pairs]
    points = [_point(t, texts, targets) for t, texts in zip(thresholds, zip(*written, strict=True), strict=True)]
    print("\n".join(table(points)), flush=True)
    cut, empty = sum(texts[0].cut for texts in written), sum(not (pair.source and pair.target) for pair in pairs)
    if cut or empty:
        print(f"of the pairs {cut} sources were cut to {longest} tokens, {empty} have an empty side", flush=True)
    draw(panels(points), Path(picture))
    print(f"{picture}: {len(sources)} sentences at {len(points)} threshold(s)", flush=True)
    return points


def _check(picture: Path, data: Files) -> None:
    """Before texts are written for minutes, and before the pairs are."""
    check_place(picture)
    if picture.resolve() in [Path(file).resolve() for file in ([data] if isinstance(data, str) else data)]:
        raise UsageError(f"`--output` must be another file than `--data`, both are `{picture}`")
    check_outside(picture, "--output")


def _point(threshold: float, written: Sequence[Written], targets: Sequence[str]) -> Point:
    """What one threshold has made of every source."""
    first, *others = [one.exits for one in written if one.exits]
    scores = score([one.texts[0] for one in written], targets, METRICS).values
    milliseconds = 1000 * median(one.seconds for one in written)
    return Point(threshold, scores, sum(others, first), len(written), milliseconds)


def table(points: Sequence[Point]) -> list[str]:
    """A line for each threshold."""
    layers = range(1, len(points[0].exits.tokens) + 1)
    heads = [f"{'threshold':>9}", *(f"{name:>8}" for name in METRICS), *(f"{f'layer {n}':>8}" for n in layers)]
    lines = ["".join([*heads, f"{'mean':>6}{'GFLOP':>11}{'ramps':>8}{'ms':>9}"])]
    for point in points:
        line = [f"{point.threshold:9.2f}", *(f"{point.scores[name]:8.2f}" for name in METRICS)]
        line += [f"{100 * share:6.1f} %" for share in point.exits.shares]
        line += [
            f"{point.exits.mean:6.2f}{point.gigaflops:11.3g}{100 * point.ramp_share:6.0f} %{point.milliseconds:9.2f}"
        ]
        lines.append("".join(line))
    return lines


def panels(points: Sequence[Point]) -> list[Panel]:
    """The same as pictures."""
    names = [f"{point.threshold:g}" for point in points]
    shares = {
        f"layer {layer + 1}": [100 * point.exits.shares[layer] for point in points]
        for layer in range(len(points[0].exits.tokens))
    }
    body = [point.gigaflops * (1 - point.ramp_share) for point in points]
    ramps = [point.gigaflops * point.ramp_share for point in points]
    return [
        Panel("ROUGE F1, %", names, {name: [point.scores[name] for point in points] for name in METRICS}, "lines"),
        Panel("tokens by exit layer, %", names, shares, "stacked"),
        Panel("decoder GFLOP a sentence", names, {"layers": body, "off-ramps": ramps}, "stacked"),
        Panel("ms a sentence, batch 1", names, {"all": [point.milliseconds for point in points]}, "stacked"),
    ]
