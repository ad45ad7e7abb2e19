"""apex's Adam and LayerNorm compute what torch's do, and a run may change between them. Stand-ins take their places on
a CPU."""

import importlib.util
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from pretrain import objectives
from pretrain.config import EngineConfig, ModelConfig, OptimConfig
from pretrain.distributed import World
from pretrain.engine import build, state
from pretrain.engine.local import LocalEngine
from pretrain.errors import EXIT_CONFIG, ConfigError
from pretrain.models import EncoderDecoder
from pretrain.models.apex_norms import apex_layer_norm, take_apex_norms
from pretrain.models.rows import to_device
from pretrain.objectives import ObjectiveModule
from pretrain.optim import adamw, create_state, parameter_groups, set_updates, updates
from tests import apex_standin
from tests.distributed_helper import run_ranks
from tests.pretrain.objectives.cases import IDS, WHOLE, unit_scale
from tests.pretrain.toy_engine import OPTIM, toy_module, toy_train

CPU, GPU = (World(0, 1, 0, torch.device(name)) for name in ("cpu", "cuda"))
SHAPE = ModelConfig(
    vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, heads=2, ffn_dim=32, max_positions=32, norm="pre",
    dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
APEX = OPTIM.model_copy(update={"kind": "apex_fused_adam"})


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in apex_standin.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def updated(optim: OptimConfig, device: str = "cpu", beforehand: bool = True) -> list[torch.Tensor]:
    """Weights of both groups after five updates."""
    module = toy_module().to(device)
    adam = adamw(parameter_groups(module, 0.1), optim)
    if beforehand:
        create_state(adam, module.parameters())
        assert updates(adam) == 0
    for step in range(5):
        torch.manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape).to(device)
        for group in adam.param_groups:
            group["lr"] = 0.01 * (step + 1)
        adam.step()
        adam.zero_grad()
    assert updates(adam) == 5
    return [p.detach().clone() for p in module.parameters()]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beforehand", [False, True])
def test_it_is_torch_s_adamw(apex: None, beforehand: bool) -> None:
    equal(updated(APEX, beforehand=beforehand), updated(OPTIM))


@pytest.mark.gpu
def test_the_real_one_is_torch_s_adamw() -> None:
    if importlib.util.find_spec("apex") is None or not torch.cuda.is_available():
        pytest.skip("needs NVIDIA's apex and a GPU")
    equal(updated(APEX, "cuda"), updated(OPTIM, "cuda"))


def engine(kind: str, optim: OptimConfig, stage: int = 0, precision: str = "fp32") -> Any:
    """Built without `build`, which refuses apex on a CPU."""
    config = EngineConfig(kind=kind, zero_stage=stage, precision=precision)  # type: ignore[arg-type]
    if kind == "local":
        return LocalEngine(config, optim, toy_module(), CPU)
    from pretrain.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, optim, toy_module(), CPU, {})


@pytest.mark.parametrize("first", [APEX, OPTIM])
def test_a_run_goes_on_with_the_other(apex: None, tmp_path: Any, first: OptimConfig) -> None:
    whole, begun, resumed = (engine("local", optim) for optim in (OPTIM, first, APEX if first is OPTIM else OPTIM))
    toy_train(whole, range(6))
    toy_train(begun, range(3))
    assert begun.updates == 3
    state.write(state.copy(begun, {}), tmp_path)
    state.load(resumed, tmp_path)
    assert resumed.updates == 3
    toy_train(resumed, range(3, 6))
    assert resumed.updates == whole.updates == 6
    for name in whole.parameters():
        equal(list(resumed.read(name).values()), list(whole.read(name).values()))


def test_what_is_counted_can_be_set(apex: None) -> None:
    module = toy_module()
    adam = adamw(parameter_groups(module, 0.1), APEX)
    create_state(adam, module.parameters())
    set_updates(adam, 7)
    assert [group["step"] for group in adam.param_groups] == [7, 7]
    assert all(set(values) == {"exp_avg", "exp_avg_sq"} for values in adam.state.values())


def with_deepspeed(world: World) -> list[tuple[int, int, list[Any]]]:
    """Updates that both count, and moments and weights of both, for every stage and precision that apex serves."""
    apex_standin.install()  # before deepspeed, which looks for it when it is imported
    found = []
    for stage, precision in ((0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32")):
        engines = [engine("deepspeed", optim, stage, precision) for optim in (APEX, OPTIM)]
        for each in engines:
            toy_train(each, range(4))
        read = [[each.read(name) for each in engines] for name in engines[0].parameters()]
        plain = [[{key: value.numpy() for key, value in one.items()} for one in pair] for pair in read]
        found.append((engines[0].updates, engines[1].updates, plain))
    return found


def test_deepspeed_takes_it() -> None:
    found = run_ranks(with_deepspeed, 1)[0]
    assert len(found) == 4
    for ours, theirs, pairs in found:
        assert ours == theirs == 4
        for pair in pairs:
            equal(*([torch.from_numpy(x) for x in one.values()] for one in pair))


def refused(world: World = CPU, **engine_values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(EngineConfig(**engine_values), APEX, toy_module(), world)
    assert caught.value.exit_code == EXIT_CONFIG == 3
    return str(caught.value)


def test_what_cannot_be_is_told(apex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs a GPU, got a CPU" in refused()
    assert "`engine.zero_stage` 0 to 2 and `engine.offload` none, got 3 and none" in refused(GPU, zero_stage=3)
    assert "got 2 and optimizer" in refused(GPU, offload="optimizer")
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    sys.modules["apex"].__file__ = "/somewhere/apex/__init__.py"
    assert "a package of that name without optimizers.FusedAdam (/somewhere/apex/__init__.py)" in refused(GPU)
    monkeypatch.setitem(sys.modules, "apex", None)
    assert "needs NVIDIA's apex, got: import of apex halted" in refused(GPU)


def test_an_apex_without_its_cuda_parts_is_told(apex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **options: Any) -> None:
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    monkeypatch.setattr(sys.modules["apex"].optimizers, "FusedAdam", broken)
    with pytest.raises(ConfigError, match=r"needs an apex built with its CUDA parts: .*requires cuda extensions"):
        adamw([], APEX)


def normed(device: str = "cpu", fused: bool = False) -> tuple[set[str], list[torch.Tensor]]:
    """Names of the weights, then what the decoder makes of some rows and the gradient of each weight."""
    objective = objectives.build({"name": "denoise"}, IDS, None, SHAPE)
    torch.manual_seed(0)
    model = EncoderDecoder(SHAPE, IDS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if fused:
        take_apex_norms(model)
        kinds = {type(one) for one in model.modules() if "LayerNorm" in type(one).__name__}
        assert kinds == {apex_layer_norm()}
    module = ObjectiveModule(model, objective).to(device)
    draw = np.random.default_rng(0)
    batch = objective.collate([objective.corrupt(draw.integers(5, 40, 12), WHOLE, draw) for _ in range(3)])
    total, _ = module(to_device(batch, torch.device(device)), unit_scale(objective, batch))
    total.backward()
    named = dict(module.named_parameters())
    return set(named), [total.detach(), *(p.grad for p in named.values() if p.grad is not None)]


def same_norms(device: str) -> None:
    (names, ours), (others, theirs) = normed(device, fused=True), normed(device)
    assert names == others and len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_its_layer_norm_is_torch_s(apex: None) -> None:
    same_norms("cpu")


@pytest.mark.gpu
def test_the_real_layer_norm_is_torch_s() -> None:
    if importlib.util.find_spec("apex") is None or not torch.cuda.is_available():
        pytest.skip("needs NVIDIA's apex and a GPU")
    same_norms("cuda")


def test_where_its_layer_norm_cannot_be(apex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(world: World) -> str:
        with pytest.raises(ConfigError) as caught:
            build(EngineConfig(layer_norm="apex"), OPTIM, toy_module(), world)
        return str(caught.value)

    assert told(CPU) == "`engine.layer_norm` apex needs a GPU, got a CPU; take torch"
    monkeypatch.delattr(sys.modules["apex.normalization"], "FusedLayerNorm")
    assert "without normalization.FusedLayerNorm" in told(GPU)
