r"""Corpus BLEU by sacrebleu.

`bleu` has its default settings (mteval-v13a tokens, mixed case), `bleu_lc` lower-cases. `bleu_tok` takes texts as
already tokenised, as fairseq-generate and multi-bleu.perl do; numbers of different tokenisers do not compare.
`bleu_compound` is `bleu_tok` after the substitution of fairseq's compound_split_bleu.sh and tensor2tensor's
get_ende_bleu.sh, s{(\S)-(\S)}{$1 ##AT##-##AT## $2}g; worth up to a point in German. Like these scripts it goes from
left to right without overlap: of `a-b-c`, where one letter stands between, only the first hyphen is split.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.scores.base import Corpus, Result, Streams, Texts

TOKENISED = {"tokenize": "none", "force": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "bleu": {},
    "bleu_lc": {"lowercase": True},
    "bleu_tok": TOKENISED,
    "bleu_compound": TOKENISED,
}
NAMES = tuple(OPTIONS)
COMPOUND = re.compile(r"(\S)-(\S)")


def score(texts: Texts, names: Sequence[str]) -> dict[str, Result]:
    """BLEU in the asked variants."""
    results = {}
    for name in names:
        hypotheses, references, more = texts.hypotheses, texts.references, {}
        if name == "bleu_compound":
            hypotheses, references = split_compounds(hypotheses), split_compounds(references)
            more = {"compounds": "split"}
        results[name] = corpus_bleu(hypotheses, [references], OPTIONS[name], more)
    return results


def split_compounds(lines: Sequence[str]) -> list[str]:
    """`rich-text format` becomes `rich ##AT##-##AT## text format`."""
    return [COMPOUND.sub(r"\1 ##AT##-##AT## \2", line) for line in lines]


def corpus_bleu(
    hypotheses: Sequence[str],
    references: Streams,
    options: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> Result:
    """Corpus BLEU in percent.

    Args:
        options: of sacrebleu's BLEU.
        more: what else the signature must say.
    """
    from sacrebleu.metrics import BLEU

    bleu = BLEU(**options)
    value = bleu.corpus_score(hypotheses, references).score
    said = dict(pair.split(":", 1) for pair in str(bleu.get_signature()).split("|"))
    said.pop("version")
    return Result(value, "sacrebleu", {**said, **(more or {})}, corpus=Corpus(options, hypotheses, references))
