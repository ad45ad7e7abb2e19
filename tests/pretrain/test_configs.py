"""Every YAML under configs/ loads, and says the same after being written and read again."""

from pathlib import Path

import pytest

from pretrain import objectives
from pretrain.config import ModelConfig, RunConfig, dump, load, read_yaml, validate
from pretrain.models import EncoderDecoder, SpecialIds

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
IDS = SpecialIds(bos=0, pad=1, eos=2, mask=4, unk=3)


def listed(folder: str) -> list[Path]:
    found = sorted((CONFIGS / folder).rglob("*.yaml"))
    assert found, f"no YAML under configs/{folder}"
    return found


@pytest.mark.parametrize("path", listed("pretrain"), ids=lambda path: path.name)
def test_pretrain_configs_load_and_round_trip(path, tmp_path):
    config = load(RunConfig, path)
    objectives.build(config.objective, IDS, None, config.model.length_classes)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(RunConfig, tmp_path / "again.yaml") == config


@pytest.mark.parametrize("path", listed("model"), ids=lambda path: path.name)
def test_model_bases_hold_only_a_model(path):
    values = read_yaml(path)
    assert set(values) == {"model"}
    assert validate(ModelConfig, values["model"], where=str(path)).vocab_size is None


def test_quickstart_is_about_8_million_parameters():
    config = load(RunConfig, CONFIGS / "pretrain" / "quickstart.yaml").model
    model = EncoderDecoder(config.model_copy(update={"vocab_size": 8192}), IDS)
    assert 7.5e6 < sum(p.numel() for p in model.parameters()) < 9e6


def test_every_yaml_is_read_by_a_test():
    known = {"pretrain", "model", "finetune", "cluster"}
    for path in CONFIGS.rglob("*.y*ml"):
        assert path.relative_to(CONFIGS).parts[0] in known, f"{path} is in a folder that no test reads"
