"""What the tasks of GLGE share (Liu et al. 2021; JANUS and ELMER use its easy version): the layout of their folders.

`xsum_data/org_data/{train,dev,test}.{src,tgt}`, an example a line. The parts of a source stand in one line with
`[SEP]` between them, which stays as it is.
"""

from finetune.tasks.data_set import Reader, aligned

READERS: tuple[Reader, ...] = (aligned("{split}.{side}"), aligned("org_data/{split}.{side}"))
PAPER = "ELMER, table 5"


def get(name: str) -> str:
    """How to get a set of GLGE."""
    return (
        f"it must hold org_data/train.src, train.tgt, dev.src, dev.tgt, test.src and test.tgt, as in {name}_data of "
        "GLGE easy: https://microsoft.github.io/glge/"
    )
