"""Multi30k, task 1 (Elliott et al. 2016): captions of images in English, German, French and Czech, any direction.

The raw captions, lower-cased as in the set's own preparation, which also normalises punctuation and tokenises: a
byte-level BPE needs neither.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

from finetune.tasks.base import Pair, Published, SplitName
from finetune.tasks.data_set import DataSet, DataSetOptions, DataSetTask, aligned
from pretrain.errors import ConfigError

Language = Literal["en", "de", "fr", "cs"]
PAIRS = {"test_2016_flickr": 1_000, "test_2017_flickr": 1_000, "test_2017_mscoco": 461, "test_2018_flickr": 1_071}


class Multi30kOptions(DataSetOptions):
    """source, target: languages. test: the test set; Czech is in those of 2016 and 2018 alone. lower: lower-case."""

    source: Language = "de"
    target: Language = "en"
    test: Literal["test_2016_flickr", "test_2017_flickr", "test_2017_mscoco", "test_2018_flickr"] = "test_2016_flickr"
    lower: bool = True


def multi30k(options: Multi30kOptions) -> DataSetTask:
    """The task; raises ConfigError for a language into itself or a test set that lacks one."""
    sides = (options.source, options.target)
    if options.source == options.target:
        raise ConfigError(f"`task.target` must be another language than `task.source`, got {options.source} for both")
    if options.hub is not None and options.test != "test_2016_flickr":
        raise ConfigError(f"`task.test` must be test_2016_flickr with `task.hub`, got {options.test}")
    if "cs" in sides and "2017" in options.test:
        raise ConfigError(f"`task.test` must be test_2016_flickr or test_2018_flickr for Czech, got {options.test}")

    def prepare(pairs: Iterable[Pair], split: SplitName) -> Iterator[Pair]:
        for pair in pairs:
            yield Pair(pair.source.lower(), pair.target.lower()) if options.lower else pair

    splits: dict[SplitName, str] = {"train": "train", "valid": "val", "test": options.test}
    about = DataSet(
        name="multi30k",
        metrics=("bleu", "bleu_lc", "repetition", "length_ratio"),
        get="it must hold train.en, train.de, val.en, test_2016_flickr.en and so on, plain or gzipped, as data/task1/"
        "raw of https://github.com/multi30k/dataset; or, for English and German, task.hub=bentrevett/multi30k",
        readers=(aligned("{split}.{side}", splits, sides, prepare),),
        columns=sides,
        from_hub=prepare,
        published=Published(
            "Elliott et al. 2016, Barrault et al. 2018",
            {"train": 29_000, "valid": 1_014, "test": PAIRS[options.test]},
        ),
    )
    return DataSetTask(about, options)
