"""Bad input on the command line: one clear line, the documented exit code, and no file made, changed or lost."""

import shutil
from pathlib import Path

import pytest
import yaml

from finetune.__main__ import main
from pretrain.bundles.bundle import load_bundle
from tests.finetune.test_end_to_end import bundle_at, config_at, place

__all__ = ["place"]
SHAPE = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "ffn_dim": 16, "max_positions": 32}


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A run of both modes, beside a bundle of hard exits and files that are wrong in one way each."""
    bundle_at(place / "elmer", ("hard_exit",), "bos_first")
    lines = (place / "test.src").read_text().splitlines()
    (place / "short").write_text("".join(f"{line}\n" for line in lines[:-1]))
    (place / "blank").write_text("\n" * len(lines))
    (place / "gaps").write_text("".join(f"{line if number % 3 else ''}\n" for number, line in enumerate(lines)))
    (place / "long").write_text("".join(f"{line} " * 12 + "\n" for line in lines))
    (place / "empty").write_text("")
    (place / "model.yaml").write_text(yaml.safe_dump({"model": SHAPE}))
    changes = {"runner": {"name": "janus", "decoding": {"ar": {"max_length": 8}, "nar": {"max_length": 8}}},
               "train": {"steps": 1, "save_every": 1}}  # fmt: skip
    assert main(["train", str(config_at(place, "good", "janus", **changes))]) == 0
    return place / "runs" / "good"


def files_in(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.name != "lock"}


def words(place: Path, line: str) -> list[str]:
    """`@name` stands for a file in `place`."""
    return line.replace("@", f"{place}/").split()


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        # files that are not line by line what they should be
        ("train @good.yaml name=x task.train=[@test.src,@short]", 4, "/short` must have as many lines as `"),
        ("train @good.yaml name=x task.test=[@test.src,@short]", 4, "/test.src`, 10, it has 9"),
        ("train @good.yaml name=x task.train=@test.src", 4, "line 1 must be source, a tab and target, got 0 tabs"),
        ("train @good.yaml name=x task.train=@none", 4, "/none` must be a UTF-8 text file: No such file"),
        ("train @good.yaml name=x task.valid=@empty", 4, "`task.valid` must hold at least one pair"),
        ("train @good.yaml name=x task.train=3", 3, "task: `train` must be a valid string, got 3"),
        (
            "train @good.yaml name=x task.train=[@test.src,@blank]",
            4,
            "at least one of the training pairs must have a source and a target of at most 16 tokens, none of 10 has: "
            "10 have an empty side, 0 a longer target",
        ),
        (
            "train @good.yaml name=x max_target=3 task.train=[@test.src,@test.tgt]",
            4,
            "none of 10 has: 0 have an empty side, 10 a longer target",
        ),
        ("train @good.yaml name=x task.valid=[@blank,@test.tgt]", 4, "at least one of the validation pairs must have"),
        ("begin @good.yaml --model @model.yaml --train-tokenizer 300 --out @b task.train=[@blank,@blank]", 4,
         "the training pairs must hold at least one word, all 10 are empty"),
        ("stats pairs task.train=[@test.src,@short]", 4, "must have as many lines as"),
        ("score --metrics bleu --hyp @short --ref @test.tgt", 4, "/short` must have as many lines as `"),
        ("score --metrics bleu --hyp @empty --ref @empty", 4, "got 0 hypotheses and 0 references"),
        ("score --task nothing --hyp @test.src --ref @test.tgt", 3, "`task.name` must be one of xsum,"),
        ("stats nothing", 3, "`task.name` must be one of xsum,"),
        ("sweep-threshold @elmer --data @test.src @short --rows predicted --output @x.png", 4, "as many lines as"),
        ("sweep-threshold @elmer --data @test.src @blank --rows predicted --output @x --sentences 1", 4, "all 1 lines"),
        # modes that do not fit
        ("generate @elmer --mode nar --input @test.src --output @x", 2, "needs a bundle with mode nar, `"),
        ("generate @runs/good/bundle --mode hard_exit --input @test.src --output @x", 2, "needs a bundle with"),
        ("sweep-threshold @runs/good/bundle --data @train.tsv --output @x.png", 2, "needs a bundle with mode hard"),
        ("generate @runs/good --mode nar --input @test.src --output @x", 5, "is a run: its bundle is `"),
        # places that texts, pages and pictures cannot have
        ("generate @runs/good/bundle --mode nar --input @test.src --output @short/x", 2, "/short` is no folder"),
        ("generate @runs/good/bundle --mode nar --input @test.src --output @runs", 2, "must be a file or new"),
        ("generate @runs/good/bundle --mode nar --input @test.src --output @elmer/x", 2, "`--output` must not be in a"),
        ("generate @elmer --mode hard_exit --input @test.src --output @elmer/a/b", 2, "must not be in a bundle"),
        ("sweep-threshold @elmer --data @train.tsv --output @train.tsv", 2, "must be another file than `--data`"),
        ("sweep-threshold @elmer --data @test.src @test.tgt --output @test.tgt", 2, "another file than `--data`"),
        ("sweep-threshold @elmer --data @train.tsv --output @runs", 2, "must be a file or new"),
        ("sweep-threshold @elmer --data @train.tsv --output @short/x.png", 2, "/short` is no folder"),
        ("sweep-threshold @elmer --data @train.tsv --output @elmer/x.png", 2, "`--output` must not be in a bundle"),
        ("report @runs/good --out @runs/good/bundle", 2, "`--out` must not be in a bundle"),
        ("report @runs/good --out @short/x", 2, "`--out` must be a folder or new"),
        ("report @runs/good/bundle --out @x", 5, "must be the folder of a run"),
    ],
)  # fmt: skip
def test_one_line_and_nothing_written(
    run: Path, place: Path, line: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_in(place)
    capsys.readouterr()
    assert main(words(place, line)) == code
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert files_in(place) == before and not printed.out


def test_layers_that_are_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "b", "--mode", "hard_exit", "--input", "i", "--output", "o", "--test-layers", "2,x"])
    assert ended.value.code == 2
    assert "--test-layers: must be numbers of layers with commas between, got '2,x'" in capsys.readouterr().err


def test_what_is_cut_or_empty_is_counted(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_at(place, "counted", "nar", train={"steps": 1, "save_every": 1})
    given = [f"task.train=[{place}/long,{place}/test.tgt]", f"task.valid=[{place}/gaps,{place}/test.tgt]"]
    assert main(["train", str(config), "max_source=24", *given]) == 0
    told = capsys.readouterr().err
    assert "10 test pairs; 10 sources cut to 24 tokens, 0 targets longer than 16 and 0 empty pairs left out\n" in told
    assert "validation: 0 sources cut to 24 tokens, 0 targets longer than 16 and 4 empty pairs left out\n" in told
    assert main(words(place, "generate @runs/counted/bundle --mode nar --input @gaps --output @written")) == 0
    assert capsys.readouterr().err.rstrip().endswith(", 4 sources empty")
    assert len((place / "written").read_text().splitlines()) == 10
    sweep = "sweep-threshold @elmer --thresholds 0 --rows predicted --max-length 8 --output @sweep.png --data"
    assert main(words(place, f"{sweep} @long @test.tgt")) == 0
    assert "of the pairs 10 sources were cut to 24 tokens, 0 have an empty side" in capsys.readouterr().out
    assert main(words(place, f"{sweep} @gaps @test.tgt")) == 0
    assert "of the pairs 0 sources were cut to 24 tokens, 4 have an empty side" in capsys.readouterr().out
    assert main(words(place, f"{sweep} @test.src @test.tgt")) == 0
    assert "of the pairs" not in capsys.readouterr().out


def test_a_report_counts_empty_sides(run: Path, place: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    few = ["report", str(tmp_path / "run"), "--beams", "1", "--iterations", "0", "--metrics", "bleu"]
    assert main([*few, "--out", str(tmp_path / "full")]) == 0
    shutil.copy(place / "gaps", tmp_path / "run" / "task" / "test.source")
    assert main([*few, "--out", str(tmp_path / "some")]) == 0
    pages = [(tmp_path / out / "report.md").read_text() for out in ("full", "some")]
    told = "Of these pairs 4 have an empty source and 0 an empty target."
    assert told not in pages[0] and told in pages[1] and "an empty source" not in pages[0]
    load_bundle(tmp_path / "run" / "bundle")
