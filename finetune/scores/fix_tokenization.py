"""The repair that GLGE gives to written questions before it scores them: `fix_tokenization` of eval_on_unilm_qg.py.

A BERT-uncased tokenizer parts a text at every mark, and the references of question generation have the words of the
Penn Treebank. This makes such words again: quotes are `` and '', brackets -lrb-, and `didn ' t` is did n't, `' s` 's,
`3 , 000` 3,000, `0 . 5` 0.5, `. . .` an ellipsis, `twenty - one` twenty-one. It is for texts whose tokens stand between
spaces, as such a tokenizer leaves them. The texts of our byte-level BPE are plain, and a mark without spaces around it
stays, so they do not need it.

The script only knows contractions with t, s, d and ll; the apostrophe of any other is a quote to it. Its rule for
initials (U . N .) needs capitals, which such a vocabulary lacks, and is left out.
"""

from string import digits, punctuation

# The script writes entities, though the references have none.
WORDS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "&": "&amp;", "<": "&lt;", ">": "&gt;", "[UNK]": "UNK",
}  # fmt: skip
QUOTES = {'"': ("``", "''"), "'": ("`", "'")}  # the opening one and the closing one, in turn


def fix_tokenization(text: str) -> str:
    """`text`, a space between two words. A rule looks at the word made last and at the two tokens to come."""
    tokens = text.split()
    made: list[str] = []
    closing = dict.fromkeys(QUOTES, False)
    at = 0
    while at < len(tokens):
        token, second, third = [*tokens[at : at + 3], "", ""][:3]
        last = made[-1] if made else ""
        taken = 2
        if token == "'" and second == "t" and last.endswith("n"):
            made[-1:] = [last[:-1], "n't"]
        elif token == "'" and second in ("s", "d", "ll"):
            made.append(f"'{second}")
        elif token == second == third == ".":
            made.append("...")
            taken = 3
        elif token == second == "-":
            made.append("--")
        elif _joins(token, last, second):
            made[-1] += token + second
        else:
            word = WORDS.get(token, token)
            if token in QUOTES:
                word = QUOTES[token][closing[token]]
                closing[token] = not closing[token]
            made.append(word)
            taken = 1
        at += taken
    return " ".join(made)


def _joins(token: str, before: str, behind: str) -> bool:
    """Whether `token` makes one word of what stands on its sides."""
    if not before or not behind:
        return False
    if token == ".":
        return not set(before + behind) - set(digits)
    if token == ",":
        return not set(before + behind) - set(f"{digits},")
    # As in the script: a word before it may end in a mark, if it is more than that.
    return token == "-" and before not in punctuation and behind[0] not in punctuation
