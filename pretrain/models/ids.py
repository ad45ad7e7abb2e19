"""The special token ids that models and objectives need, as plain integers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialIds:
    """Ids of `<s>`, `<pad>`, `</s>`, `<mask>` and `<unk>` in the tokenizer at hand."""

    bos: int
    pad: int
    eos: int
    mask: int
    unk: int

    @property
    def never_written(self) -> list[int]:
        """All but that of `</s>`, which ends a text."""
        return [self.bos, self.pad, self.mask, self.unk]
