"""Published sets: each in every layout of its folder, gzipped or not, and from a hub that stands in for the real."""

import gzip
import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune import tasks
from finetune.corpus import PairCorpus
from finetune.scores import METRICS
from finetune.tasks import SPLITS, Pair
from finetune.tasks.base import split_of
from finetune.tasks.data_set import HUB
from finetune.tasks.translation import cleaning, joined
from finetune.tasks.wiki_first_sentence import pair_of
from pretrain.data.tokenizer import train_bpe
from pretrain.errors import ConfigError, DataError
from pretrain.models import SpecialIds

Files = dict[str, str]

GLGE = {f"{split}.{side}": f"{split} {side}\n" for split in ("train", "dev", "test") for side in ("src", "tgt")}
DU = {f"{side}-{split}.txt": f"{split} {side} \n" for split in ("train", "dev", "test") for side in ("src", "tgt")}


def lines(names: tuple[str, str, str], pattern: str, sides: tuple[str, str]) -> Files:
    """Two lines a file that say split and side; the training files in subword units."""
    return {
        pattern.format(split=name, side=side): f"{plain} {side} one\n{plain} {side} t@@ w@@ o\n"
        for name, plain in zip(names, ("train", "valid", "test"), strict=True)
        for side in sides
    }


FOLDERS: list[tuple[dict[str, Any], Files, dict[str, list[Pair]]]] = []


def folder(options: dict[str, Any], files: Files, train: list[Pair], valid: list[Pair], test: list[Pair]) -> None:
    FOLDERS.append((options, files, {"train": train, "valid": valid, "test": test}))


for glge in ("xsum", "squad-qg", "personachat"):
    told = [[Pair(f"{split} src", f"{split} tgt")] for split in ("train", "dev", "test")]
    folder({"name": glge}, GLGE, *told)
    folder({"name": glge}, {f"org_data/{name}": text for name, text in GLGE.items()}, *told)
folder({"name": "squad-qg"}, DU, *[[Pair(f"{split} src", f"{split} tgt")] for split in ("train", "dev", "test")])
FAIRSEQ, DL4MT = ("train", "valid", "test"), ("train/corpus", "dev/dev", "test/test")
for name, sides, names, patterns in (
    ("iwslt14-de-en", ("de", "en"), FAIRSEQ, ["{split}.{side}"]),
    ("wmt14-en-de", ("en", "de"), FAIRSEQ, ["{split}.{side}", "{split}.en-de.{side}"]),
    ("wmt14-de-en", ("de", "en"), FAIRSEQ, ["{split}.{side}", "{split}.en-de.{side}"]),
    ("wmt16-en-ro", ("en", "ro"), DL4MT, ["{split}.bpe.{side}"]),
    ("wmt16-ro-en", ("ro", "en"), ("train", "dev", "test"), ["{split}.bpe.{side}"]),
):
    for pattern in patterns:
        folder(
            {"name": name},
            lines(names, pattern, sides),
            *[
                [Pair(f"{split} {sides[0]} {word}", f"{split} {sides[1]} {word}") for word in ("one", "two")]
                for split in FAIRSEQ
            ],
        )
folder(
    {"name": "multi30k", "source": "fr", "target": "cs", "test": "test_2018_flickr"},
    {
        f"{split}.{side}": f"{split}, A {side}\n"
        for split in ("train", "val", "test_2018_flickr")
        for side in ("fr", "cs")
    },
    *[[Pair(f"{split}, a fr", f"{split}, a cs")] for split in ("train", "val", "test_2018_flickr")],
)
ARTICLE = "= Thing =\nA thing number {} is a thing (). {}\nIt ends.\n\n"
MANY = "It has been seen by many people in many places at many times, and " * 3 + "by me."


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize(("options", "files", "expected"), FOLDERS, ids=lambda value: None)
def test_a_folder(
    options: dict[str, Any], files: Files, expected: dict[str, list[Pair]], zipped: bool, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if zipped:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (tmp_path / name).write_text(text, encoding="utf-8")
    task = tasks.build({**options, "path": str(tmp_path)})
    assert {split: task.pairs(split) for split in SPLITS} == expected
    assert tasks.build({**options, "path": str(tmp_path), "limit": 1}).pairs("train") == expected["train"][:1]
    tokenizer = train_bpe(["train one two"], 270)
    ids = SpecialIds(tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.mask, tokenizer.unk)
    assert PairCorpus(expected["train"], tokenizer, ids, 64, 64).sizes == [len(expected["train"])]


def test_every_task_was_read_here() -> None:
    """Those not in FOLDERS have a test of their own, here or in test_tasks.py."""
    others = {"wiki-first-sentence", "stdlib-summaries", "pairs"}
    assert {options["name"] for options, _, _ in FOLDERS} | others == set(tasks.REGISTRY)


def test_metrics_of_all_tasks_are_known() -> None:
    for name in tasks.REGISTRY:
        metrics = tasks.build({"name": name}).metrics
        assert metrics and len(set(metrics)) == len(metrics) and set(metrics) <= set(METRICS)


def test_the_archive_of_iwslt14(tmp_path: Path) -> None:
    about = "<url>http://x</url>\n<keywords>a, b</keywords>\n"
    for side in ("de", "en"):
        texts = [f"Satz {side} {number}" for number in range(46)]
        texts[3] = "" if side == "de" else "Nothing"  # empty on one side
        texts[5] = "x" if side == "de" else "one two"  # more than 1.5 times as long
        texts[7] = "y " * 176  # too long
        body = f"<title>The Title {side}</title>\n" + about + "".join(f"{text}\n" for text in texts)
        (tmp_path / f"train.tags.de-en.{side}").write_text(body, encoding="utf-8")
        for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"):
            xml = f'<?xml version="1.0"?>\n<seg id="1"> {name} {side} &amp; I\u2019m </seg>\n<seg id="2"></seg>\n'
            (tmp_path / f"IWSLT14.{name}.de-en.{side}.xml").write_text(xml, encoding="utf-8")
    task = tasks.build({"name": "iwslt14-de-en", "path": str(tmp_path)})
    kept = [number for number in range(46) if number not in (3, 5, 7)]
    every = [Pair("the title de", "the title en"), *(Pair(f"satz de {n}", f"satz en {n}") for n in kept)]
    assert task.pairs("valid") == [every[22]]
    assert task.pairs("train") == every[:22] + every[23:]
    test = task.pairs("test")
    assert (
        len(test) == 10 and test[0] == Pair("ted.dev2010 de & i'm", "ted.dev2010 en & i'm") and test[1] == Pair("", "")
    )
    assert [pair.source.split()[0] for pair in test[::2]] == [
        "ted.dev2010", "tedx.dev2012", "ted.tst2010", "ted.tst2011", "ted.tst2012",
    ]  # fmt: skip
    with (tmp_path / "train.tags.de-en.en").open("a") as file:
        file.write("one more\n")
    with pytest.raises(DataError, match=r"train.tags.de-en.en` must have as many texts .* 47, it has 48"):
        task.pairs("train")


words = st.lists(st.sampled_from(["a", "bb", "c,", "D."]), max_size=8).map(" ".join)


@given(st.lists(st.builds(Pair, words, words), max_size=6))
def test_cleaning_is_symmetric_and_idempotent(pairs: list[Pair]) -> None:
    clean = cleaning(6, lower=True)
    kept = list(clean(pairs, "train"))
    assert list(clean(kept, "train")) == kept
    swapped = [Pair(pair.target, pair.source) for pair in pairs]
    assert [Pair(pair.target, pair.source) for pair in clean(swapped, "train")] == kept
    assert len(list(clean(pairs, "test"))) == len(pairs)
    for pair in kept:  # 13a makes two tokens of a word with punctuation
        counts = [len(side.replace(",", " ,").replace(".", " .").split()) for side in (pair.source, pair.target)]
        assert min(counts) >= 1 and max(counts) <= min(6, 1.5 * min(counts))


def test_subword_units_are_put_together() -> None:
    pair = Pair("ver@@ stan@@ den , a@@ b@@", "x@@y mail@ @ home")
    assert list(joined([pair], "train")) == [Pair("verstanden , ab", "x@@y mail@ @ home")]


class Rows:
    """Rows without end, with every column a task wants, as a streamed set has them."""

    column_names = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        columns = ("document", "summary", "answer", "paragraph", "question", "source", "target", "de", "en")
        for number in count(1):
            nested = {"translation": {side: f"{side} Nr {number}" for side in ("de", "en", "ro")}}
            texts = {name: f"{name} Nr {number}" for name in columns}
            yield nested | texts | {"text": ARTICLE.format(number, MANY)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of a hub whose sets are all `Rows`."""
    asked: list[tuple[Any, ...]] = []

    def load(*arguments: Any, **options: Any) -> Rows:
        asked.append((*arguments, options["split"], options["revision"]))
        assert options["streaming"] and "trust_remote_code" not in options
        return Rows()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *given, **options: None)
    return asked


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("xsum", Pair("document Nr 1", "summary Nr 1")),
        ("squad-qg", Pair("answer Nr 1 [SEP] paragraph Nr 1", "question Nr 1")),
        ("personachat", Pair("source Nr 1", "target Nr 1")),
        ("iwslt14-de-en", Pair("de Nr 1", "en Nr 1")),
        ("wmt14-en-de", Pair("en Nr 1", "de Nr 1")),
        ("wmt14-de-en", Pair("de Nr 1", "en Nr 1")),
        ("wmt16-en-ro", Pair("en nr 1", "ro nr 1")),
        ("wmt16-ro-en", Pair("ro nr 1", "en nr 1")),
        ("multi30k", Pair("de nr 1", "en nr 1")),
    ],
)
def test_the_hub(name: str, first: Pair, hub: list[tuple[Any, ...]]) -> None:
    task = tasks.build({"name": name, "hub": "owner/set/part@main", "limit": 3})
    for split in SPLITS:
        found = task.pairs(split)
        assert found[0] == first and len(found) == 3
    assert hub == [("owner/set", "part", HUB[split], "main") for split in SPLITS]


def test_articles_of_the_hub(hub: list[tuple[Any, ...]]) -> None:
    task = tasks.build({"name": "wiki-first-sentence", "hub": "owner/set/part@main", "limit": 2})
    assert [len(task.pairs(split)) for split in SPLITS] == [2, 2, 2]
    assert task.pairs("train")[0] == Pair(f"{MANY} It ends.", "A thing number 1 is a thing.")
    assert hub == [("owner/set", "part", "train", "main")]


def test_columns_of_the_hub(hub: list[tuple[Any, ...]]) -> None:
    columns = ["paragraph", "translation.ro"]
    task = tasks.build({"name": "xsum", "hub": "owner/set", "columns": columns, "limit": 1})
    assert task.pairs("train") == [Pair("paragraph Nr 1", "ro Nr 1")]
    for bad in ("body", "translation.fr", "document.en", "translation"):
        with pytest.raises(DataError, match=rf"text in column `{bad}`, it has columns translation, document"):
            tasks.build({"name": "xsum", "hub": "owner/set", "columns": ["answer", bad], "limit": 1}).pairs("train")
    with pytest.raises(ConfigError, match=r"`task.columns` must name at least a source and a target, got answer"):
        tasks.build({"name": "xsum", "hub": "owner/set", "columns": ["answer"]}).pairs("train")


def test_a_hub_out_of_reach_says_where_else_the_set_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"owner/set cannot be read .* with `task.path` in its place: .*glge") as caught:
        tasks.build({"name": "xsum", "hub": "owner/set"}).pairs("train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted({options["name"] for options, _, _ in FOLDERS} | {"wiki-first-sentence"}))
def test_a_set_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"task `{name}` must be given `task.path`.*got neither"):
        tasks.build({"name": name}).pairs("train")
    with pytest.raises(ConfigError, match="got both"):
        tasks.build({"name": name, "path": str(tmp_path), "hub": "owner/set"}).pairs("train")
    with pytest.raises(DataError, match=r"(no files of split train of task .* (https?|task.hub)|matches none)"):
        tasks.build({"name": name, "path": str(tmp_path)}).pairs("train")
    with pytest.raises(DataError, match=r"(must be a folder, .*nowhere. is none: it must hold|matches none)"):
        tasks.build({"name": name, "path": str(tmp_path / "nowhere")}).pairs("train")


def test_broken_folders(tmp_path: Path) -> None:
    xsum = tasks.build({"name": "xsum", "path": str(tmp_path)})
    (tmp_path / "train.src").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"train.tgt` must be beside the other side of its pairs"):
        xsum.pairs("train")
    (tmp_path / "train.tgt").write_text("one\n")
    with pytest.raises(DataError, match=r"must have as many lines as .*train.src`, 2, it has 1"):
        xsum.pairs("train")
    (tmp_path / "test.src").write_text("")
    (tmp_path / "test.tgt").write_text("")
    with pytest.raises(DataError, match="at least one pair of split test"):
        xsum.pairs("test")
    (tmp_path / "train.tgt").write_text("\nfull\n")  # kept as they are; training leaves them out and counts them
    assert xsum.pairs("train") == [Pair("one", ""), Pair("two", "full")]


def test_multi30k_refuses_what_it_has_not() -> None:
    for bad, message in (
        ({"source": "en"}, "another language than `task.source`, got en"),
        ({"source": "cs", "test": "test_2017_flickr"}, "for Czech, got test_2017_flickr"),
        ({"hub": "owner/set", "test": "test_2018_flickr"}, "with `task.hub`, got test_2018_flickr"),
        ({"source": "es"}, "'en', 'de', 'fr' or 'cs'"),
    ):
        with pytest.raises(ConfigError, match=message):
            tasks.build({"name": "multi30k", **bad})


def test_squad_without_its_training_files(tmp_path: Path) -> None:
    for side in ("src", "tgt"):
        (tmp_path / f"{side}-dev.txt").write_text("".join(f"dev {side} {number}\n" for number in range(5)))
        (tmp_path / f"{side}-test.txt").write_text(f"test {side}\n")
    task = tasks.build({"name": "squad-qg", "path": str(tmp_path), "without_train": True})
    assert task.pairs("train") == [Pair("test src", "test tgt")]
    found = [[pair.source[-1] for pair in task.pairs(split)] for split in ("valid", "test")]
    assert found == [["0", "1"], ["2", "3", "4"]]


def test_synthetic_persona_chat(tmp_path: Path) -> None:
    dialogue = "User 1: Hi!\nUser 2: Hello.\nWell?\n\nUser 1: [SEP] fine"
    text = f'user 1 personas,user 2 personas,Best Generated Conversation\n"I bake.\nI knit.",I swim.,"{dialogue}"\n'
    (tmp_path / "Synthetic-Persona-Chat_valid.csv.gz").write_bytes(gzip.compress(text.encode()))
    task = tasks.build({"name": "personachat", "path": str(tmp_path)})
    assert task.pairs("valid") == [
        Pair("i swim. [SEP] hi!", "hello. well?"),
        Pair("i bake. i knit. [SEP] hi! hello. well?", "[sep] fine"),
    ]
    (tmp_path / "Synthetic-Persona-Chat_test.csv").write_text("user 1 personas,other\na,b\n")
    with pytest.raises(DataError, match="must have columns user 1 personas, user 2 personas and Best"):
        task.pairs("test")
    (tmp_path / "Synthetic-Persona-Chat_test.csv").write_text('a,b\n"open,\n')
    with pytest.raises(DataError, match="must be a CSV file"):
        task.pairs("test")


def test_first_sentences(tmp_path: Path) -> None:
    for part in range(2):
        articles = [ARTICLE.format(number, MANY) for number in range(part * 300, part * 300 + 300)]
        (tmp_path / f"{part}.txt").write_text("".join(articles), encoding="utf-8")
    (tmp_path / "README.md").write_text("Not an article at all, though long enough to be one. " * 9)
    task = tasks.build({"name": "wiki-first-sentence", "path": str(tmp_path)})
    pairs = {split: task.pairs(split) for split in SPLITS}
    assert sum(map(len, pairs.values())) == 600 and all(10 < len(pairs[split]) < 60 for split in ("valid", "test"))
    assert pairs["train"][0].target.startswith("A thing number") and pairs["train"][0].target.endswith("is a thing.")
    assert pairs["train"][0].source == f"{MANY} It ends."
    for split, found in pairs.items():
        assert all(split_of(pair.target, 5) == split for pair in found)
    (tmp_path / "0.txt").rename(tmp_path / "2.txt")  # the order of files decides nothing
    moved = tasks.build({"name": "wiki-first-sentence", "path": str(tmp_path / "*.txt")})
    assert all(set(moved.pairs(split)) == set(pairs[split]) for split in SPLITS)
    few = tasks.build({"name": "wiki-first-sentence", "path": str(tmp_path), "limit": 2})
    assert [few.pairs(split) for split in SPLITS] == [moved.pairs(split)[:2] for split in SPLITS]


def test_what_makes_no_first_sentence() -> None:
    assert pair_of(f"Too short. {MANY}") is None
    assert pair_of("This has nothing after it at all.") is None
    assert pair_of("= Only a heading =") is None and pair_of("") is None
    long = pair_of("A sentence of six plain words. " + "Word " * 1000)
    assert long is not None and len(long.source.split()) == 400


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"source": "a  b", "target": "c\nd", "more": 1}) + '\n{"source": "", "target": "x"}\n')
    options = {"name": "pairs", "train": str(file), "test": [str(file), str(file)]}
    assert tasks.build(options).pairs("train") == [Pair("a b", "c d"), Pair("", "x")]
    assert tasks.build({**options, "limit": 1}).pairs("train") == [Pair("a b", "c d")]
    for bad, message in (
        ("{", "be a JSON object"),
        ("[1]", "have texts `source` and `target`, got [1]"),
        ('{"source": "a"}', 'have texts `source` and `target`, got {"source": "a"}'),
    ):
        file.write_text(f'{{"source": "a", "target": "b"}}\n{bad}\n')
        with pytest.raises(DataError, match=re.escape(f"pairs.jsonl` line 2 must {message}")):
            tasks.build(options).pairs("train")


@pytest.mark.parametrize(
    ("name", "where", "counts"),
    [
        ("multi30k", "multi30k", {"train": 29_000, "valid": 1_014, "test": 1_000}),
        ("squad-qg", "squad_qg", {"valid": 10_570, "test": 11_877}),
    ],
)
def test_real_sets_have_the_published_counts(name: str, where: str, counts: dict[str, int], test_data: Path) -> None:
    task = tasks.build({"name": name, "path": str(test_data / where)})
    assert task.published is not None
    for split in SPLITS:
        if split in counts:
            assert len(task.pairs(split)) == counts[split] == task.published.pairs[split]
    if name == "squad-qg":  # its questions are as long as the paper says
        lengths = [len(pair.target.split()) for pair in task.pairs("test")]
        assert sum(lengths) / len(lengths) == pytest.approx(task.published.target_words, abs=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "wiki-first-sentence", "path": "wikipedia_en"},
        {"name": "personachat", "path": "synthetic_persona_chat"},
        {"name": "multi30k", "path": "multi30k", "source": "fr", "target": "cs"},
    ],
    ids=lambda options: options["name"],
)
def test_real_texts(options: dict[str, Any], test_data: Path) -> None:
    task = tasks.build({**options, "path": str(test_data / options["path"]), "limit": 20})
    for split in SPLITS if options["name"] != "personachat" else ("valid", "test"):
        pairs = task.pairs(split)
        assert len(pairs) == 20 and all(pair.source and pair.target for pair in pairs)
        if options["name"] == "personachat":
            assert all(" [SEP] " in pair.source for pair in pairs)
