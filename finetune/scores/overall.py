"""OVERALL, the mean by which tables of JANUS and ELMER order their rows; Distinct counts in percent."""

from collections.abc import Mapping
from statistics import fmean

from finetune.scores.base import OURS, Result

PARTS: dict[str, tuple[str, ...]] = {
    "overall_xsum": ("rouge1", "rouge2", "rougeLsum"),
    "overall_squad": ("coco_rougeL", "coco_bleu4", "meteor"),
    "overall_squad_meteor15": ("coco_rougeL", "coco_bleu4", "meteor15"),
    "overall_personachat": ("personachat_bleu1", "personachat_bleu2", "distinct1", "distinct2"),
}


def combine(name: str, results: Mapping[str, Result]) -> Result:
    """The mean of the parts of `name`, which `results` must hold; percent."""
    parts = {part: results[part] for part in PARTS[name]}
    said = ",".join(f"{part} ({result.library} {result.version})" for part, result in parts.items())
    return Result(fmean(result.value for result in parts.values()), OURS, {"mean": said})
