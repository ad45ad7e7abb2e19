"""WMT14 English <-> German and WMT16 English <-> Romanian, each in both directions.

Folders are those of the papers: fairseq's page of non-autoregressive translation has WMT14 (`train.en-de.en`), and
dl4mt-nonauto WMT16 (`train/corpus.bpe.en`), lower-cased; both Moses-tokenised, in subword units, and cleaned. The hub
has raw text, cleaned here as by fairseq's scripts (1 to 250 tokens, ratio 1.5) and, for Romanian, lower-cased.
"""

from finetune.tasks.base import Published, SplitName
from finetune.tasks.data_set import DEV, DataSet, aligned
from finetune.tasks.translation import FAIRSEQ, METRICS, cleaning, joined

DL4MT: dict[SplitName, str] = {"train": "train/corpus", "valid": "dev/dev", "test": "test/test"}
MOST = 250


def _wmt14(source: str, target: str) -> DataSet:
    sides = (source, target)
    return DataSet(
        name=f"wmt14-{source}-{target}",
        metrics=METRICS,
        get="it must hold train.en-de.en, train.en-de.de, valid.en-de.en and so on, as in "
        "http://dl.fbaipublicfiles.com/nat/original_dataset.zip, or train.en, train.de, valid.en and so on as "
        "fairseq's examples/translation/prepare-wmt14en2de.sh writes them; or task.hub=wmt/wmt14/de-en",
        readers=tuple(
            aligned(pattern, FAIRSEQ, sides, joined) for pattern in ("{split}.en-de.{side}", "{split}.{side}")
        ),
        columns=(f"translation.{source}", f"translation.{target}"),
        from_hub=cleaning(MOST),
        published=Published("Understanding KD in NAT, table 6", {"train": 4_500_966, "valid": 3_000, "test": 3_003}),
    )


def _wmt16(source: str, target: str) -> DataSet:
    sides = (source, target)
    return DataSet(
        name=f"wmt16-{source}-{target}",
        metrics=METRICS,
        get="it must hold train/corpus.bpe.en, train/corpus.bpe.ro, dev/dev.bpe.en and so on, as wmt16/en-ro in the "
        "archive that https://github.com/nyu-dl/dl4mt-nonauto names; or task.hub=wmt/wmt16/ro-en",
        readers=(
            aligned("{split}.bpe.{side}", DL4MT, sides, joined),
            aligned("{split}.bpe.{side}", DEV, sides, joined),
            aligned("{split}.{side}", FAIRSEQ, sides, joined),
        ),
        columns=(f"translation.{source}", f"translation.{target}"),
        from_hub=cleaning(MOST, lower=True),
        published=Published("WMT16: newsdev2016, newstest2016", {"valid": 1_999, "test": 1_999}),
    )


WMT14_EN_DE, WMT14_DE_EN = _wmt14("en", "de"), _wmt14("de", "en")
WMT16_EN_RO, WMT16_RO_EN = _wmt16("en", "ro"), _wmt16("ro", "en")
