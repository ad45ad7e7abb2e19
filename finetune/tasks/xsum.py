"""XSum (Narayan et al. 2018): the one-sentence summary of an article of the BBC, from GLGE or from the hub."""

from finetune.tasks.base import Published
from finetune.tasks.data_set import DataSet
from finetune.tasks.glge import PAPER, READERS, get

XSUM = DataSet(
    name="xsum",
    metrics=("rougeL", "rouge1", "rouge2", "rougeLsum", "overall_xsum", "repetition", "length_ratio"),
    get=f"{get('xsum')}; or task.hub=EdinburghNLP/xsum",
    readers=READERS,
    columns=("document", "summary"),
    published=Published(PAPER, {"train": 204_045, "valid": 11_332, "test": 11_334}, 21.1),
)
