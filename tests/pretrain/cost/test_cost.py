"""Parameters, operations, memory and disk against counters, allocations and files."""

import gc
import json
import warnings

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parlance_kernels import backend, library
from parlance_kernels.sample_attention.reference import sample_attention_reference
from parlance_kernels.vocab_loss import cuda as kernel
from pretrain import objectives
from pretrain.checkpoints import checkpoint
from pretrain.config import EngineConfig, ModelConfig, OptimConfig
from pretrain.cost.flops import Flops, batch_flops, facts, parameters_by_part
from pretrain.cost.memory import activation_bytes, checkpoint_bytes, loss_bytes, rank_memory
from pretrain.cost.peak import DATA_SHEETS, device_peak
from pretrain.distributed import World
from pretrain.engine import build
from pretrain.models import EncoderDecoder, layers
from pretrain.objectives import ObjectiveModule
from tests.distributed_helper import run_ranks
from tests.pretrain.checkpoints.commits import save_state
from tests.pretrain.objectives.cases import IDS, SHAPE, VOCAB, WHOLE, examples, fitted, tiny_model, unit_scale

NAMES = ("janus", "cmlm", "denoise", "lplm", "hard_exit", "soft_exit")
FEW = OptimConfig(lr=0.01)


def objective_of(name, layers=2, **options):
    shape = SHAPE.model_copy(update={"decoder_layers": layers})
    return objectives.build({"name": name, **options}, IDS, None, shape)


def model_for(name, **changes):
    return tiny_model(soft_exit=name == "soft_exit", **changes)


def counted(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [True, False])
def test_linear_layers_and_heads_cost_what_torch_counts(name, share):
    model, objective = model_for(name), objective_of(name, **({"share_encoder": share} if name == "janus" else {}))
    batch = objective.collate(fitted(objective, examples()))
    flops = batch_flops(model.config, batch)

    def step():
        objective.losses(model, batch, unit_scale(objective, batch))[0].backward()

    found = counted(step)
    # the counter does not know addmm_, which adds up the gradient of the vocabulary's weight
    unseen = 2 * batch.head_rows * model.config.d_model * VOCAB
    if name == "soft_exit":  # what is fed back is looked up by the same product, once more and without gradient
        unseen -= 2 * len(batch.target_L) * model.config.d_model * VOCAB
    linear = flops.training - 3 * flops.attention
    assert linear == found["aten.mm"] + found["aten.addmm"] + unseen


def test_attention_costs_what_its_definition_counts_where_every_row_reads_every_key(monkeypatch):
    monkeypatch.setattr(
        layers, "sample_attention", lambda q, k, v, mask, **_: sample_attention_reference(q, k, v, mask)
    )
    model, objective = tiny_model(), objective_of("cmlm")
    batch = objective.collate(examples(sizes=((5, 7, 3),)))  # one sample: nobody is hidden from anybody
    found = counted(lambda: objective.losses(model, batch, unit_scale(objective, batch)))
    assert batch_flops(model.config, batch).attention == found["aten.bmm"]


@pytest.mark.parametrize("name", NAMES)
def test_attention_counts_the_pairs_of_the_masks_and_samples_add_up(name):
    model, objective = model_for(name, decoder_layers=3), objective_of(name, 3)
    given = fitted(objective, examples())
    batch = objective.collate(given)
    pairs = 2 * batch.source.mask.materialise().sum()
    for work in batch.rows.work(3):
        pairs += work.self_mask.materialise().sum() + work.cross_mask.materialise().sum()
    flops = batch_flops(model.config, batch)
    assert flops.attention == 4 * model.config.d_model * int(pairs)
    apart = [batch_flops(model.config, objective.collate([one])) for one in given]
    assert sum(apart, Flops()) == flops
    assert batch_flops(model.config, objective.collate([])) == Flops()


def test_the_hidden_tokens_of_a_batch_are_counted_whatever_a_term_is_divided_by():
    for options in ({}, {"ce_reduction": "target_tokens"}):
        objective = objective_of("janus", **options)
        batch = objective.collate(examples())
        assert facts(tiny_model())["masked"](batch) == 3 + 0 + 6 + 1
    assert facts(tiny_model())["masked"](objective_of("denoise").collate(examples())) == 0


def test_parameters_are_all_in_one_part_and_meta_needs_no_memory():
    model = tiny_model()
    parts = parameters_by_part(model)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts["token table, also the head"] == VOCAB * 16 and parts["positions"] == 2 * 66 * 16
    with torch.device("meta"):
        assert parameters_by_part(EncoderDecoder(model.config, IDS)) == parts
    assert "positions" not in parameters_by_part(tiny_model(positions="sinusoidal"))


SHAPES = (
    {"dropout": 0.0, "attention_dropout": 0.0},
    {"dropout": 0.1, "attention_dropout": 0.0, "norm": "pre"},
    {"dropout": 0.1, "attention_dropout": 0.1, "heads": 8, "ffn_dim": 64},
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(name, shape, checkpointing):
    config = ModelConfig(
        **{
            "vocab_size": 200, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "heads": 4, "ffn_dim": 256,
            "length_classes": 24, "max_positions": 128, **shape,
        }
    )  # fmt: skip
    config = config.model_copy(update={"soft_exit": name == "soft_exit"})
    model, objective, rng = EncoderDecoder(config, IDS, checkpointing), objective_of(name, 3), np.random.default_rng(0)
    batch = objective.collate([objective.corrupt(rng.integers(5, 200, n), WHOLE, rng) for n in (64, 54, 34, 60)])
    weights = {value.untyped_storage().data_ptr() for value in model.state_dict(keep_vars=True).values()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value):
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value  # alive, so that its address stays its own
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        objective.losses(model, batch, unit_scale(objective, batch))
    saved = sum(value.untyped_storage().nbytes() for value in kept.values())
    estimate = activation_bytes(config, batch, "fp32", "cpu", checkpointing)
    if checkpointing:  # the inside of a layer comes back in the backward, which the hooks do not see
        assert saved < estimate < activation_bytes(config, batch, "fp32", "cpu")
    else:
        assert estimate == pytest.approx(saved, rel=0.08)


def test_deciding_where_rows_leave_is_a_forward_of_its_own():
    model = tiny_model(decoder_layers=3)
    every, simulated = (objective_of("hard_exit", 3, training=training) for training in ("all", "simulated"))
    counts = [facts(model)["flops"](o.collate(examples())) for o in (every, simulated)]
    plain = [batch_flops(model.config, o.collate(examples())) for o in (every, simulated)]
    assert counts[0] == plain[0].training
    rows = sum(len(e.target) - 1 for e in examples())
    asked = 2 * 2 * rows * model.config.d_model * VOCAB  # two off-ramps
    in_the_encoder = 2 * sum(len(e.source) ** 2 for e in examples())  # pairs that attend, in two layers
    decoder = plain[1].decoder + plain[1].attention - 4 * model.config.d_model * in_the_encoder
    assert counts[1] == plain[1].training + decoder + asked


def engine_of(world, kind, stage, precision):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"vocab_size": 2000, "d_model": 128, "encoder_layers": 1, "decoder_layers": 1, "ffn_dim": 256}
        model = EncoderDecoder(ModelConfig(**shape, dropout=0.0, attention_dropout=0.0, max_positions=32), IDS)
    config = EngineConfig(kind=kind, zero_stage=stage, precision=precision)
    module = ObjectiveModule(model, objective_of("janus"))
    return config, module, build(config, FEW, module, world)


def alive():
    """Bytes of all tensors of this process."""
    gc.collect()
    seen = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in gc.get_objects():
            if isinstance(one, torch.Tensor) and one.device.type == "cpu":
                seen[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(seen.values())


def held(world, kind, stage, precision):
    """(bytes of an engine between two updates, what was computed without buffers and gradients)."""
    before = alive()
    config, module, engine = engine_of(world, kind, stage, precision)
    with torch.device("meta"):
        shapes = EncoderDecoder(module.model.config, IDS)
    computed = rank_memory(shapes, module.model.config, config, world.size, "cpu", 0).device
    batch = module.objective.collate(examples())
    for _ in range(2):
        engine.accumulate([batch], unit_scale(module.objective, batch))
        engine.step(0.01)
    del batch
    return alive() - before, computed["weights"] + computed["masters"] + computed["optimizer"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_masters_and_moments_are_what_the_local_engine_holds(precision):
    found, computed = held(World(0, 1, 0, torch.device("cpu")), "local", 0, precision)
    assert found == pytest.approx(computed, rel=0.01)


def test_weights_masters_and_moments_are_what_a_rank_of_zero_2_holds():
    (found, computed), _ = run_ranks(held, 2, "deepspeed", 2, "fp32")
    assert found == pytest.approx(computed, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_worst_moment_of_an_update_is_near_the_estimate(precision, tmp_path):
    rng = np.random.default_rng(0)
    config, module, engine = engine_of(World(0, 1, 0, torch.device("cpu")), "local", 0, precision)
    model = module.model.config
    batch = module.objective.collate(
        [module.objective.corrupt(rng.integers(5, 2000, 30), WHOLE, rng) for _ in range(24)]
    )
    scale = unit_scale(module.objective, batch)
    engine.accumulate([batch], scale)
    engine.step(0.01)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        engine.accumulate([batch], scale)
        engine.step(0.01)
    computed = rank_memory(module, model, config, 1, "cpu", activation_bytes(model, batch, precision, "cpu"))
    lasting = sum(computed.device[kind] for kind in ("weights", "masters", "optimizer"))
    assert computed.total - lasting == pytest.approx(worst_moment(profile, tmp_path), rel=0.25)


def worst_moment(profile, tmp_path):
    """The most bytes that lived at once of those allocated while `profile` watched."""
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    allocated = [event for event in trace if event.get("name") == "[memory]"]
    level, worst = 0, 0
    for event in sorted(allocated, key=lambda event: event["ts"]):
        level += event["args"]["Bytes"]
        worst = max(worst, level)
    return worst


@pytest.mark.parametrize("vocabulary", [4003, 4096])
def test_the_kernel_of_the_vocabulary_loss_holds_what_was_computed(vocabulary, tmp_path, monkeypatch):
    """Everything but the kernel, which allocates nothing, runs on a CPU as it does on a GPU."""
    monkeypatch.setattr(library, "call", lambda *_: None)
    rows, width = kernel.CHUNK_ROWS + 300, 16
    h_RD, weight_VD = torch.ones(rows, width).bfloat16(), torch.ones(vocabulary, width).bfloat16()
    target_R, tuple_PK = torch.zeros(rows, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64)
    given = h_RD, weight_VD, None, target_R, target_R, tuple_PK, [1.0], [], [], 0.0, kernel.CHUNK_ROWS, True, False
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        made = kernel.loss_cuda(*given)
    computed = loss_bytes(ModelConfig(vocab_size=vocabulary, d_model=width), 2, with_kernel=True)
    assert computed == pytest.approx(worst_moment(profile, tmp_path), rel=0.05)
    assert len(made[4]) == vocabulary


def test_a_gpu_with_the_kernels_has_the_kernel_s_chunks(monkeypatch):
    config = ModelConfig(vocab_size=2000, d_model=128)
    with torch.device("meta"):
        model = EncoderDecoder(config, IDS, backend="torch")

    def loss(device, **engine):
        engine = EngineConfig(precision="bf16", **engine)
        return rank_memory(model, config, engine, 1, device, 0).device["vocabulary loss"]

    plain = loss_bytes(config, 2, with_kernel=False)
    assert loss("cuda") == loss("cpu") == plain
    monkeypatch.setattr(backend, "available_backends", lambda: ("torch", "cuda"))
    assert loss("cuda") == loss_bytes(config, 2, with_kernel=True) > plain
    assert loss("cpu") == loss("cuda", backend="torch") == plain


def test_sharding_and_offload_move_bytes():
    config = ModelConfig(vocab_size=2000, d_model=128)
    with torch.device("meta"):
        model = EncoderDecoder(config, IDS)

    def memory(ranks, **changes):
        return rank_memory(model, config, EngineConfig(**changes), ranks, "cuda", 1000)

    count = sum(p.numel() for p in model.parameters())
    alone = memory(1, kind="local").device
    assert (alone["weights"], alone["gradients"], alone["masters"], alone["optimizer"]) == (
        4 * count, 4 * count, 0, 8 * count
    )  # fmt: skip
    stages = [memory(8, zero_stage=stage, precision="bf16") for stage in (1, 2)]
    assert all(m.device["optimizer"] == 8 * -(-count // 8) and m.device["weights"] == 2 * count for m in stages)
    assert stages[1].device["gradients"] < stages[0].device["gradients"]
    offloaded = memory(8, zero_stage=2, precision="bf16", offload="optimizer")
    assert offloaded.total < stages[1].total and offloaded.host["optimizer"] == stages[1].device["optimizer"]
    assert "optimizer" not in offloaded.device and offloaded.device["activations"] == 1000
    cut = memory(8, zero_stage=3, precision="bf16", offload="all")
    assert "gradients" not in cut.device and cut.host["gradients"] == 2 * 4 * -(-count // 8), "both sums are the host's"
    assert cut.training == sum(cut.host.values()) and cut.in_host == max(cut.training, cut.building)


@pytest.mark.parametrize("bias", [False, True])
def test_a_checkpoint_weighs_what_was_computed(bias, tmp_path):
    world = World(0, 1, 0, torch.device("cpu"))
    model = tiny_model(logits_bias=bias).float()
    module = ObjectiveModule(model, objective_of("janus"))
    engine = build(EngineConfig(kind="local"), FEW, module, world)
    store, _ = checkpoint.open_store(tmp_path)
    save_state(store, 1, engine, world, {"step": 1})
    store.unlock()
    found = sum(file.stat().st_size for file in (tmp_path / "checkpoints" / "step-00000001").iterdir())
    assert checkpoint_bytes(module, 1) == pytest.approx(found, rel=0.01)


def test_peaks_come_from_a_table_or_from_a_measurement(monkeypatch):
    state = torch.get_rng_state()
    measured = device_peak(torch.device("cpu"), "fp32")
    assert measured.flops > 1e8 and measured.source.startswith("measured: fp32")
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn"
    cuda = torch.device("cuda", 0)
    for name, half, single in (
        ("NVIDIA H200", 989e12, 67e12), ("NVIDIA H100 80GB HBM3", 989e12, 67e12), ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12), ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
        ("NVIDIA L4", 121e12, 30.3e12),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert (device_peak(cuda, "bf16").flops, device_peak(cuda, "fp32").flops) == (half, single), name
        assert name in device_peak(cuda, "bf16").source
    assert all(half >= single for _, half, single in DATA_SHEETS)
