"""The registry of tasks: a new one is its file, one line here, one YAML a runner and one test."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from finetune.tasks.base import SPLITS, Pair, Published, SplitName, Task, one_line
from finetune.tasks.data_set import DataSet, DataSetOptions, DataSetTask
from finetune.tasks.iwslt14 import IWSLT14_DE_EN
from finetune.tasks.multi30k import Multi30kOptions, multi30k
from finetune.tasks.pairs import Pairs, PairsOptions
from finetune.tasks.personachat import PERSONACHAT
from finetune.tasks.squad_qg import SquadQgOptions, squad_qg
from finetune.tasks.stdlib_summaries import StdlibSummaries, StdlibSummariesOptions
from finetune.tasks.wiki_first_sentence import WikiFirstSentence, WikiFirstSentenceOptions
from finetune.tasks.wmt import WMT14_DE_EN, WMT14_EN_DE, WMT16_EN_RO, WMT16_RO_EN
from finetune.tasks.xsum import XSUM
from pretrain.config import Section, choose

__all__ = ["REGISTRY", "SPLITS", "Pair", "Published", "SplitName", "Task", "build", "one_line"]

Entry = tuple[type[Section], Callable[..., Task]]


def _of(about: DataSet) -> Entry:
    return DataSetOptions, partial(DataSetTask, about)


REGISTRY: dict[str, Entry] = {
    "xsum": _of(XSUM),
    "squad-qg": (SquadQgOptions, squad_qg),
    "personachat": _of(PERSONACHAT),
    "iwslt14-de-en": _of(IWSLT14_DE_EN),
    "wmt14-en-de": _of(WMT14_EN_DE),
    "wmt14-de-en": _of(WMT14_DE_EN),
    "wmt16-en-ro": _of(WMT16_EN_RO),
    "wmt16-ro-en": _of(WMT16_RO_EN),
    "multi30k": (Multi30kOptions, multi30k),
    "wiki-first-sentence": (WikiFirstSentenceOptions, WikiFirstSentence),
    "stdlib-summaries": (StdlibSummariesOptions, StdlibSummaries),
    "pairs": (PairsOptions, Pairs),
}


def build(options: Mapping[str, Any]) -> Task:
    """The task that `options["name"]` names; raises ConfigError for an unknown name or option."""
    chosen, make = choose(REGISTRY, options, "task")
    return make(chosen)
