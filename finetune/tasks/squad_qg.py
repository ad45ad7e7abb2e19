"""Question generation from SQuAD 1.1 in the split of Du et al. (2017): a passage to a question about it.

Two layouts of a folder. GLGE's has `answer [SEP] passage` as source. That of Du et al. has the sentence that holds the
answer, lower-cased, and does not say the answer: a harder task, whose scores are not those of the papers.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from finetune.tasks.base import Pair, Published, SplitName
from finetune.tasks.data_set import DataSet, DataSetOptions, DataSetTask, aligned
from finetune.tasks.glge import PAPER, READERS, get

DU = aligned("{side}-{split}.txt")

SQUAD_QG = DataSet(
    name="squad-qg",
    metrics=("coco_rougeL", "coco_bleu4", "meteor", "overall_squad", "repetition", "length_ratio"),
    get=f"{get('squadqg')}; or src-train.txt, tgt-train.txt, src-dev.txt and so on, as data/processed of "
    "https://github.com/xinyadu/nqg; or task.hub=lmqg/qg_squad",
    readers=(*READERS, DU),
    columns=("answer", "paragraph", "question"),
    published=Published(PAPER, {"train": 75_722, "valid": 10_570, "test": 11_877}, 11.6),
)


class SquadQgOptions(DataSetOptions):
    """without_train: for a copy of Du et al. that lacks its large training files: train on the published test set,
    validate on the first half of the published dev set and test on the second; no scores to compare with papers.
    """

    without_train: bool = False


def squad_qg(options: SquadQgOptions) -> DataSetTask:
    """The task."""
    return DataSetTask(replace(SQUAD_QG, readers=(stand_in,)) if options.without_train else SQUAD_QG, options)


def stand_in(folder: Path, split: SplitName) -> Iterable[Pair] | None:
    """The splits of `without_train`; articles stand together, so that halves share one at most."""
    found = DU(folder, "test" if split == "train" else "valid")
    if found is None or split == "train":
        return found
    pairs = list(found)
    half = len(pairs) // 2
    return pairs[:half] if split == "valid" else pairs[half:]
