"""What `handoff` says of a bundle that must be tuned before it writes."""

import pytest

from pretrain.bundles.description import Description
from pretrain.bundles.handoff import advice
from pretrain.config import ModelConfig
from pretrain.models import SpecialIds
from pretrain.models.patterns import ArLayout

IDS = SpecialIds(bos=0, pad=1, eos=2, mask=4, unk=3)


@pytest.mark.parametrize(
    ("modes", "objective", "length_trained", "wanted"),
    [
        (("ar", "nar"), {"name": "janus"}, False, "tune before `--mode nar`"),
        (("ar", "nar"), {"name": "janus"}, True, ""),
        (("causal",), {"name": "denoise"}, False, ""),
        (("hard_exit",), {"name": "lplm"}, False, "rows told the length: tune before `--mode hard_exit`"),
        (("hard_exit",), {"name": "lplm"}, True, ""),
        (("hard_exit",), {"name": "lplm", "preset": "released"}, False, ""),
        (("hard_exit",), {"name": "lplm", "rows": 63}, False, ""),
        (("hard_exit",), {"name": "hard_exit"}, False, "tune before `--mode hard_exit`"),
        (("soft_exit",), {"name": "soft_exit"}, True, "tune before `--mode soft_exit`"),
    ],
)
def test_what_must_be_tuned_is_said(modes, objective, length_trained, wanted):
    layout = ArLayout.aligned("bos_first", IDS)
    description = Description(ModelConfig(vocab_size=40), IDS, layout, modes, objective, length_trained=length_trained)
    note = advice(description)
    assert wanted in note and bool(wanted) == bool(note) and "\n" not in note
