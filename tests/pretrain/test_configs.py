"""Every YAML under configs/ loads, and says the same after being written and read again."""

from pathlib import Path

import pytest
import torch

from pretrain import objectives
from pretrain.config import ModelConfig, RunConfig, dump, load, validate
from pretrain.engine.tensor_parallel import check
from pretrain.models import EncoderDecoder, SpecialIds
from pretrain.parsing import read_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
IDS = SpecialIds(bos=0, pad=1, eos=2, mask=4, unk=3)


def listed(folder: str) -> list[Path]:
    found = sorted((CONFIGS / folder).rglob("*.yaml"))
    assert found, f"no YAML under configs/{folder}"
    return found


@pytest.mark.parametrize("path", listed("pretrain"), ids=lambda path: path.name)
def test_pretrain_configs_load_and_round_trip(path, tmp_path):
    config = load(RunConfig, path)
    objectives.build(config.objective, IDS, None, config.model)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(RunConfig, tmp_path / "again.yaml") == config


@pytest.mark.parametrize("path", listed("model"), ids=lambda path: path.name)
def test_model_bases_hold_only_a_model(path):
    values = read_yaml(path)
    assert set(values) == {"model"}
    assert validate(ModelConfig, values["model"], where=str(path)).vocab_size is None


@pytest.mark.parametrize(
    ("name", "vocabulary", "least", "most"),
    [("large", 50265, 400e6, 410e6), ("3b", 50265, 2.9e9, 3.1e9), ("11b", 50265, 11e9, 12e9)],
)
def test_large_shapes_have_the_size_in_their_name_and_can_be_cut_into_eight(name, vocabulary, least, most):
    values = read_yaml(CONFIGS / "model" / f"{name}.yaml")["model"]
    shape = validate(ModelConfig, {**values, "vocab_size": vocabulary}, where=name)
    with torch.device("meta"):  # nothing is allocated
        model = EncoderDecoder(shape, IDS)
    assert least < sum(p.numel() for p in model.parameters()) < most
    check(shape, 8)


def test_quickstart_is_about_8_million_parameters():
    config = load(RunConfig, CONFIGS / "pretrain" / "quickstart.yaml").model
    model = EncoderDecoder(config.model_copy(update={"vocab_size": 8192}), IDS)
    assert 7.5e6 < sum(p.numel() for p in model.parameters()) < 9e6


def test_base_configs_have_the_papers_setting_and_differ_in_their_objective_alone():
    """JANUS, sections 3.3 and 4.2."""
    runs = {kind: load(RunConfig, CONFIGS / "pretrain" / f"{kind}_base.yaml") for kind in ("janus", "denoise", "cmlm")}
    janus = runs["janus"]
    assert (janus.optim.lr, janus.batch.samples, janus.train.epochs) == (1e-4, 1024, 2.0)
    objective = objectives.build(janus.objective, IDS, None, 256)
    corruption = objective.options.corruption
    assert (corruption.encoder_ratio, corruption.decoder_ratio, objective.layout.layout) == (0.3, 0.5, "eos_first")
    for kind, control in runs.items():
        assert control.objective["name"] == kind
        for section in ("init_from", "data", "model", "optim", "engine", "train", "seed"):
            assert getattr(control, section) == getattr(janus, section), f"{kind}: {section}"
        assert control.batch.samples == janus.batch.samples


def test_every_yaml_is_read_by_a_test():
    known = {"pretrain", "model", "finetune", "cluster", "data", "reproduce"}
    for path in CONFIGS.rglob("*.y*ml"):
        assert path.relative_to(CONFIGS).parts[0] in known, f"{path} is in a folder that no test reads"
