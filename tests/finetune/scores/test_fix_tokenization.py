"""The repair of BERT's tokens, worked out by hand from the rules of the script, and what goes through it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.__main__ import main
from finetune.scores import score
from finetune.scores.fix_tokenization import fix_tokenization
from pretrain.errors import ConfigError

LONELY = [*"()[]{}<>&'\",.-", "[UNK]", "n", "t", "s", "ll", "12", "word"]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("( a ) [ b ] { c }", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb-"),
        ("at & t < 3 > 2 [UNK] [unk]", "at &amp; t &lt; 3 &gt; 2 UNK [unk]"),
        # quotes in turn, double and single apart
        ('" a \' b " c \' " d', "`` a ` b '' c ' `` d"),
        ("they didn ' t , can ' t", "they did n't , ca n't"),
        ("don ' t the dog ' s , he ' d , we ' ll", "do n't the dog 's , he 'd , we 'll"),
        ("n ' t", " n't"),
        # no n before it, or none of the four letters behind: a quote, which the next one closes
        ("it ' t we ' re i ' m", "it ` t we ' re i ` m"),
        ("dogs '", "dogs `"),
        ("wait . . . what . .", "wait ... what . ."),
        (". . . . . .", "... ..."),
        ("$ 3 , 000 , 000 and 4 , or , 5", "$ 3,000,000 and 4 , or , 5"),
        ("3 . 03 . 1 a . 5 5 . a", "3.03 . 1 a . 5 5 . a"),
        (", , 5", ",,5"),
        ("1 . 5 , 6", "1.5 , 6"),
        ("twenty - one , state - of - the - art", "twenty-one , state-of-the-art"),
        ("- a -", "- a -"),
        ("1990 - - 95", "1990 -- 95"),
        ("a , - b", "a , - b"),
        ("a - ( b )", "a - -lrb- b -rrb-"),
        ("( - b", "-lrb--b"),  # what was made of a mark is none
        ("a - - - b", "a ---b"),
        ("rock - n ' t", "rock- n't"),
        # no capitals, no initials
        ("u . n . u.n.", "u . n . u.n."),
        ("", ""),
    ],
)
def test_rules(tokens: str, words: str) -> None:
    assert fix_tokenization(tokens) == words


@given(st.lists(st.sampled_from(["the", "dog's", "didn't", "(it)", "3,000", "co-op", "u.s.", "end."]), max_size=8))
def test_plain_texts_stay_as_they_are(words: list[str]) -> None:
    assert fix_tokenization(" ".join(words)) == " ".join(words)


@given(st.lists(st.sampled_from(LONELY), max_size=12))
def test_nothing_is_lost(tokens: list[str]) -> None:
    """Without spaces, and with quotes and brackets as they were, the text is the same."""
    made = fix_tokenization(" ".join(tokens)).replace(" ", "")
    back = [("``", '"'), ("''", '"'), ("-lrb-", "("), ("-rrb-", ")"), ("-lsb-", "["), ("-rsb-", "]"), ("-lcb-", "{")]
    back += [("-rcb-", "}"), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"), ("`", "'")]
    for one, other in back:
        made = made.replace(one, other)
    assert made.replace('"', "''") == "".join(tokens).replace("[UNK]", "UNK").replace('"', "''")


def test_hypotheses_alone_go_through_it() -> None:
    """The reference has `( )` and keeps it: of 5 words each, 3 are the same; lower-cased is everything."""
    hypotheses, references = ["What IS ( 3 , 000 )"], ["what is ( 3,000 )"]
    names = ["coco_rougeL", "meteor", "rouge1"]
    plain, fixed = (score(hypotheses, references, names, fix_tokenization=on) for on in (False, True))
    assert fixed.values["coco_rougeL"] == pytest.approx(100 * 3 / 5)
    precision, recall = 4 / 7, 4 / 5
    assert plain.values["coco_rougeL"] == pytest.approx(100 * 2.44 * precision * recall / (recall + 1.44 * precision))
    assert plain.values["meteor"] != fixed.values["meteor"] and plain.values["rouge1"] == fixed.values["rouge1"]
    assert "|hyp:fix_tokenization|case:lc|items:1|" in fixed.signatures["meteor"]
    assert "fix_tokenization" not in fixed.signatures["rouge1"] + plain.signatures["coco_rougeL"]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, line in (("hyp", "who didn ' t go ?"), ("ref", "who did n't go ?"), ("other", "who did n't go ?")):
        (tmp_path / name).write_text(f"{line}\n")
    files = ["score", "--hyp", str(tmp_path / "hyp"), "--ref", str(tmp_path / "ref"), "--fix-tokenization", "--json"]
    assert main([*files, "--task", "squad-qg", "--against", str(tmp_path / "other")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [told["scores"][name] for name in ("coco_bleu4", "coco_rougeL")] == pytest.approx([100.0, 100.0])
    assert told["metrics"]["coco_bleu4"]["options"]["hyp"] == "fix_tokenization"
    assert told["against"]["coco_rougeL"]["against"] == pytest.approx(100.0)
    assert main([*files, "--metrics", "bleu,rouge1"]) == 3
    assert "none of which is in bleu, rouge1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="`fix_tokenization` is for coco_bleu4"):
        score(["a"], ["a"], ["bleu"], fix_tokenization=True)
