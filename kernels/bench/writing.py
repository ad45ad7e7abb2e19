"""Every way to write, timed side by side: one process, one run, equal weights, and no speed before its equality check.

python kernels/bench/writing.py [KEY=VALUE ...] [--device D] [--batch B ...] [--source S] [--tokens T] [--repeats N]
                                [--threads N] [--small] [--out FILE]

KEY=VALUE are fields of the model, which has BART-base's shape unless told. Beside it stands an AR model with twice its
encoder layers and one decoder layer (Kasai et al. 2021), which is about as large and writes far faster: the strongest
argument against writing all at once. All texts and all sources are equally long, all arithmetic is in float32.

Weights are random. Left to right and all at once that does not matter. Hard exit and self-drafting depend on what a
model has learned, so both are shown at their ends: nobody leaves, or everybody does; all drafts are wrong, or right.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH), str(BENCH.parent.parent)]

import torch  # noqa: E402
from exit_latency import ALWAYS_SURE, NEVER_SURE, check_hard, check_soft, hard, soft  # noqa: E402
from harness import medians  # noqa: E402
from latency import CONFIG  # noqa: E402
from twins import Twins  # noqa: E402
from writing_checks import Agreed, check_beam, check_ct2, check_draft, check_pass, check_query  # noqa: E402

from finetune.decoding import ArDecoding, DraftDecoding, Generated, beam_search, draft  # noqa: E402
from pretrain.config import ModelConfig, assign, validate  # noqa: E402
from pretrain.errors import ConfigError  # noqa: E402
from pretrain.models import EncoderDecoder, SourceRows  # noqa: E402
from pretrain.models.patterns import ArLayout  # noqa: E402
from pretrain.parsing import parse_scalar  # noqa: E402

BEAMS, ITERATIONS = (1, 5), (0, 1, 4, 10)
OURS, THEIRS, CT2 = "parlance", "transformers", "ctranslate2"
SMALL: dict[str, Any] = {"vocab_size": 512, "d_model": 64, "heads": 4, "ffn_dim": 128}
SMALL |= {"encoder_layers": 2, "decoder_layers": 2}
USUAL: dict[str, Any] = {"batch": [1, 8], "source": 64, "tokens": 32, "repeats": 3}
FEW: dict[str, Any] = {"batch": [1, 3], "source": 12, "tokens": 12, "repeats": 1}
PACKAGES = ("torch", "transformers", "ctranslate2")
YARDSTICK = (THEIRS, "AR, beam 5")  # of the first model


class Way(NamedTuple):
    """One row of the table before it was timed. model: encoder and decoder layers."""

    model: str
    by: str
    name: str
    write: Callable[[], object]
    agreed: Agreed


def ar_ways(twins: Twins, source: SourceRows) -> Iterator[Way]:
    """Plain BART from left to right, by all three."""
    model = name_of(twins.config)
    for beam in BEAMS:
        name = f"AR, beam {beam}"
        ours, theirs = check_beam(twins, source, beam)
        yield Way(model, THEIRS, name, partial(twins.their_beam, source, beam), theirs)
        yield Way(model, OURS, name, partial(twins.our_beam, source, beam), ours)
        if twins.translator is not None:
            agreed = check_ct2(twins, source, beam)
            yield Way(model, CT2, name, partial(twins.ct2_words, source, beam), agreed)


def janus_ways(twins: Twins, source: SourceRows) -> Iterator[Way]:
    """What one JANUS network does: left to right from its query stream, all at once, and drafting for itself."""
    model = name_of(twins.config)
    for beam in BEAMS:
        agreed = check_query(twins, source, beam)
        yield Way(model, OURS, f"JANUS AR, beam {beam}", partial(twins.our_beam, source, beam, "query"), agreed)
    for right in (False, True):
        layout = twins.layout if right else replace(twins.layout, query_position_offset=1)
        options = ArDecoding(beam=1, max_length=twins.tokens)
        greedy = beam_search(_blind(twins), source, layout, "query", options)
        agreed = check_draft(drafted(twins, layout, source), greedy, right)
        told = "right" if right else "wrong"
        yield Way(model, OURS, f"JANUS AR, drafts {told}", partial(drafted, twins, layout, source), agreed)
    for count in ITERATIONS:
        agreed = check_pass(twins, source, count)
        yield Way(model, OURS, f"NAR, {count} iterations", partial(twins.our_pass, source, count), agreed)


def exit_ways(twins: Twins, source: SourceRows) -> Iterator[Way]:
    """ELMER: one pass over MASKs with exits."""
    model = name_of(twins.config)
    once = [max(1, twins.config.decoder_layers // 3)]
    ends: list[tuple[str, float, list[int] | None]] = [
        ("nobody leaves", NEVER_SURE, None),
        (f"asked at layer {once[0]}, nobody leaves", NEVER_SURE, once),
        ("all leave at layer 1", ALWAYS_SURE, None),
    ]
    for told, threshold, layers in ends:
        agreed = check_hard(twins, source, threshold, layers)
        yield Way(model, OURS, f"hard exit, {told}", partial(hard, twins, source, threshold, layers), agreed)
    yield Way(model, OURS, "soft exit", partial(soft, twins, source), check_soft(twins, source))


def drafted(twins: Twins, layout: ArLayout, source: SourceRows) -> Generated:
    """Self-drafting with the usual block."""
    return draft(_blind(twins), source, layout, DraftDecoding(max_length=twins.tokens))


@cache
def _blind(twins: Twins) -> EncoderDecoder:
    """The same model, but that what a token reads in its own text counts nothing.

    A MASK then depends on its position and the source alone. So drafts are what AR writes where both have the same
    position for a token, and never where AR has the next one.
    """
    shared = {id(parameter): parameter for parameter in twins.ours.parameters()}
    network = copy.deepcopy(twins.ours, shared)
    for name, module in network.decoder.named_modules():
        if name.endswith("self_attn.out_proj"):
            for kind, parameter in list(module.named_parameters()):
                setattr(module, kind, torch.nn.Parameter(torch.zeros_like(parameter)))
    return network


@torch.no_grad()
def encode(twins: Twins, by: str, source: SourceRows) -> object:
    """The encoder alone; of CTranslate2, which does not offer that, a text of two tokens."""
    if by == OURS:
        return twins.ours.encode(source)
    if by == THEIRS:
        return twins.theirs("sdpa").get_encoder()(source.tokens_R.view(source.n_samples, -1))
    return twins.ct2_words(source, beam=1, tokens=2)


def measure(every: Sequence[Twins], batch: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each way to write a batch, after all of them were checked."""
    base = every[0]
    ways = [way for twins in every for way in ar_ways(twins, twins.sources(batch))]
    ways += [*janus_ways(base, base.sources(batch)), *exit_ways(base, base.sources(batch))]
    encoders = {
        (name_of(twins.config), by): partial(encode, twins, by, twins.sources(batch))
        for twins in every
        for by in (OURS, THEIRS, CT2)[: 3 if twins.translator is not None else 2]
    }
    for run in encoders.values():  # the check was the warm-up of the others
        run()
    runs: list[Callable[[], object]] = [*(way.write for way in ways), *encoders.values()]
    seconds = medians([_finished(run, base.device) for run in runs], repeats, warmup=0)
    encoding = dict(zip(encoders, seconds[len(ways) :], strict=True))
    whole = {way[:3]: value for way, value in zip(ways, seconds, strict=False)}
    for (model, by), value in encoding.items():
        if by == CT2:  # two tokens, less what two tokens more cost
            a_token = (whole[model, by, "AR, beam 1"] - value) / (base.tokens - 2)
            encoding[model, by] = max(0.0, value - 2 * a_token)
    yardstick = whole[(name_of(base.config), *YARDSTICK)]
    return [
        {
            "batch": batch,
            "model": way.model,
            "by": way.by,
            "way": way.name,
            "ms_a_sentence": 1e3 * value / batch,
            "sentences_a_second": batch / value,
            "speedup": yardstick / value,
            "encoder_share": encoding[way.model, way.by] / value,
            "passes": way.agreed.passes,
            "check": way.agreed.says,
        }
        for way, value in zip(ways, seconds, strict=False)
    ]


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines for people; `speedup` is over transformers' AR, beam 5, on the first model and the same batch."""
    head = f"{'ms/sentence':>12}{'sentences/s':>13}{'speed-up':>10}{'encoder':>9}{'passes':>8}"
    yield f"{'batch':>5}  {'layers':7}{'by':14}{'way':41}{head}  check"
    for row in rows:
        told = f"{row['batch']:>5}  {row['model']:7}{row['by']:14}{row['way']:41}{row['ms_a_sentence']:12.1f}"
        told += f"{row['sentences_a_second']:13.2f}{row['speedup']:10.2f}{100 * row['encoder_share']:8.0f}%"
        yield f"{told}{row['passes']:8}  {row['check']}"


def name_of(config: ModelConfig) -> str:
    """Layers of encoder and decoder."""
    return f"{config.encoder_layers}+{config.decoder_layers}"


def _finished(run: Callable[[], object], device: str) -> Callable[[], None]:
    """`run`, and the device is done."""

    def whole() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, measures, prints the table and writes the JSON; ends with 1 if two sides write different texts."""
    parser = argparse.ArgumentParser(description="Every way to write, timed side by side")
    parser.add_argument("model", nargs="*", metavar="KEY=VALUE", help="fields of the model; default BART-base")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, nargs="+", help="sentences at once; default 1 and 8")
    parser.add_argument("--source", type=int, help="tokens of a source; default 64")
    parser.add_argument("--tokens", type=int, help="new tokens of a text; default 32")
    parser.add_argument("--repeats", type=int, help="of which the median is taken; default 3")
    parser.add_argument("--threads", type=int, help="of torch and of CTranslate2; default torch's")
    parser.add_argument("--small", action="store_true", help="a model, texts and batches that take seconds")
    parser.add_argument("--out", type=Path, help="default results/writing_DEVICE.json here; none with --small")
    given = parser.parse_args(arguments)
    for name, usual in (FEW if given.small else USUAL).items():
        if getattr(given, name) is None:
            setattr(given, name, usual)
    batches, source, tokens, repeats = given.batch, given.source, given.tokens, given.repeats
    if min(source, tokens) < 4 or min(repeats, 1 if given.threads is None else given.threads, *batches) < 1:
        parser.error("`--source` and `--tokens` must be at least 4, `--batch`, `--repeats` and `--threads` at least 1")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device cuda` needs a GPU, torch finds none")
    try:
        config = _config({**CONFIG.model_dump(), **(SMALL if given.small else {})}, given.model)
    except ConfigError as error:
        parser.error(str(error))
    if config.decoder_layers < 2:
        parser.error(f"`decoder_layers` must be at least 2, or nothing can leave early, got {config.decoder_layers}")
    most = min(config.max_positions, config.length_classes) - 3
    if source > config.max_positions or tokens > most:
        parser.error(f"`--source` must be at most {config.max_positions} and `--tokens` {most}: the model has no more")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    deep = config.model_copy(update={"encoder_layers": 2 * config.encoder_layers, "decoder_layers": 1})
    every = [Twins(one, tokens, source, given.device) for one in (config, deep)]
    settings = _settings(given.device, config, source=source, tokens=tokens, repeats=repeats)
    print(", ".join(f"{name} {value}" for name, value in settings.items() if name != "model"), flush=True)
    if every[0].translator is None:
        print(f"CTranslate2 is left out: it is not installed for {given.device}", file=sys.stderr, flush=True)
    rows = [row for batch in batches for row in measure(every, batch, repeats)]
    print("\n".join(table(rows)), flush=True)
    out = given.out or (None if given.small else BENCH / "results" / f"writing_{given.device}.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def _config(values: dict[str, Any], overrides: Sequence[str]) -> ModelConfig:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"`{override}` must look like key=value")
        assign(values, key, parse_scalar(text, where=f"`{override}`"))
    return validate(ModelConfig, values, where="model")


def _settings(device: str, config: ModelConfig, **sizes: int) -> dict[str, Any]:
    """Where and with what it was measured."""
    found = [name for name in PACKAGES if importlib.util.find_spec(name)]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        **sizes,
        **{name: importlib.metadata.version(name) for name in found},
        "model": config.model_dump(mode="json"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
