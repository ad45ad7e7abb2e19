"""METEOR, in two versions that do not compare.

`meteor` is NLTK's: the metric of Lavie & Agarwal (2007), alpha 0.9, beta 3, gamma 0.5, on words and Porter stems.
WordNet is left out even where it is installed, so that a value does not depend on the machine. Mean over items.

`meteor15` is METEOR 1.5 (Denkowski & Lavie 2014), `-l en -norm`, as the papers' question generation has it: the jar
and the wrapper of the package pycocoevalcap, run by Java. It aggregates over the corpus.
"""

from collections.abc import Sequence
from types import SimpleNamespace

from finetune.scores.base import Result, Texts, mean_of
from finetune.scores.items import Item, merged, options_of
from pretrain.errors import ConfigError

NAMES = ("meteor", "meteor15")
NO_WORDNET = SimpleNamespace(synsets=lambda word: [])


def score(texts: Texts, names: Sequence[str]) -> dict[str, Result]:
    """The asked versions, over the items of `items.py`.

    Raises:
        ConfigError: `meteor15` without Java or pycocoevalcap.
    """
    items = merged(texts)
    said = options_of(texts, items)
    results = {}
    if "meteor" in names:
        results["meteor"] = mean_of(
            _nltk(items), "nltk", average="items", match="exact,porter", alpha=0.9, beta=3.0, gamma=0.5, **said
        )
    if "meteor15" in names:
        results["meteor15"] = Result(100 * _jar(items), "pycocoevalcap", {"jar": "meteor-1.5 -l en -norm", **said})
    return results


def _nltk(items: Sequence[Item]) -> list[float]:
    from nltk.translate.meteor_score import meteor_score

    return [
        meteor_score([r.split() for r in item.references], item.hypothesis.split(), wordnet=NO_WORDNET)
        for item in items
    ]


def _jar(items: Sequence[Item]) -> float:
    import shutil

    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError:
        raise ConfigError("metric `meteor15` needs pycocoevalcap, which is missing: pip install '.[meteor]'") from None
    if shutil.which("java") is None:
        raise ConfigError("metric `meteor15` needs Java 8 or later: `java` must be on the PATH, it is not")
    # The jar parts its fields by |||.
    hypotheses = {number: [item.hypothesis.replace("|||", "")] for number, item in enumerate(items)}
    references = {number: [r.replace("|||", "") for r in item.references] for number, item in enumerate(items)}
    try:
        value, _ = Meteor().compute_score(references, hypotheses)
    except (ValueError, BrokenPipeError) as error:
        raise ConfigError(f"metric `meteor15` must get numbers from its jar, Java ended: {error}") from None
    return float(value)
