"""`plan`: its arithmetic against the stream and the run it speaks of, and what it refuses."""

import json
import re
import shutil

import pytest

from pretrain.__main__ import main
from pretrain.report import figures, measure
from pretrain.report import plan as planning
from tests.pretrain.runs import make_data, write_config, write_text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("text"), 200)


@pytest.fixture
def planned(data, tmp_path, capsys):
    """Plans the tiny run; returns what was printed."""

    def run(*arguments, code=0):
        capsys.readouterr()
        assert main(["plan", str(write_config(tmp_path, data)), *arguments]) == code
        assert not (tmp_path / "runs").exists(), "nothing is written"
        return capsys.readouterr()

    return run


def number(pattern, text):
    found = re.search(pattern, text)
    assert found, (pattern, text)
    return float(found[1].replace(",", ""))


def test_the_table_holds_the_arithmetic_of_the_run(planned, data, tmp_path):
    out = planned("train.steps=10", "--no-measure").out
    assert "batch: 6 samples an update" in out and "length: 10 updates" in out
    tokens = number(r"6 samples, ([\d,]+) target tokens", out)
    micros = number(r"1 rank\(s\) x (\d+) micro-batch", out)
    assert micros >= tokens / 96
    samples = number(r"epochs of ([\d,]+) samples", out)
    assert number(r"tokens, ([\d.]+) epochs", out) == pytest.approx(60 / samples, abs=0.01)
    for title in ("parameters: ", "memory of a rank, local fp32: ", "disk: ", "work: ", "time"):
        assert f"\n{title}" in out
    assert "fits in" in out and "not measured" in out

    assert main(["train", str(write_config(tmp_path, data)), "train.steps=1"]) == 0
    run = tmp_path / "runs" / "tiny"
    state = json.loads((run / "checkpoints" / "step-00000001" / "state.json").read_text())
    count = sum(int.__mul__(*shape) if len(shape) == 2 else shape[0] for shape in state["parameters"].values())
    assert number(r"parameters: ([\d,]+)", out) == count
    weighs = sum(file.stat().st_size for file in (run / "checkpoints" / "step-00000001").iterdir())
    assert number(r"being written, ([\d.]+) kB each", out) * 1000 == pytest.approx(weighs, rel=0.01)
    shutil.rmtree(tmp_path / "runs")


def test_ranks_cut_the_batch_and_shard_the_optimizer(planned):
    def line(out, kind):
        return number(rf"([\d.]+) kB  {kind}\n", out)

    zero = ("engine.kind=deepspeed", "engine.zero_stage=2", "--no-measure")
    alone, four = planned(*zero).out, planned(*zero, "--ranks", "4").out
    assert "= 4 rank(s) x" in four and line(four, "optimizer") == pytest.approx(line(alone, "optimizer") / 4, rel=0.01)
    assert line(four, "weights") == line(alone, "weights")
    assert re.search(r"work: (\S+)FLOP", four)[1] == re.search(r"work: (\S+)FLOP", alone)[1], (
        "ranks share the same work"
    )


def test_numbers_stand_below_each_other_and_add_up(planned):
    out = planned("--no-measure").out
    blocks = dict(re.findall(r"\n(parameters|memory of a rank|work)[^\n]*: ([^\n]*\n(?:  [^\n]*\n)+)", out))
    parts = re.findall(r"(?m)^  ( *[\d.,]+(?: kB| MB|%)?)  \w", "".join(blocks.values()))
    assert len(parts) >= 12 and {len(part) for part in parts} == {14}, "right-aligned"
    head, *lines = blocks["parameters"].splitlines()
    assert int(head.replace(",", "")) == sum(int(line.split()[0].replace(",", "")) for line in lines)
    head, *lines = blocks["memory of a rank"].splitlines()
    sizes = re.findall(r"  ([\d.]+) (kB|MB)  ", "\n".join(lines))
    kilo = [float(size) * {"kB": 1, "MB": 1000}[unit] for size, unit in sizes]
    assert sum(kilo) * 1000 == pytest.approx(number(r"([\d.]+) MB, fits", head) * 1e6, rel=0.01)
    assert {"weights", "gradients", "optimizer", "activations"} <= {line.split()[-1] for line in lines}
    shares = [int(line.split("%")[0]) for line in blocks["work"].splitlines()[1:]]
    assert sum(shares) == pytest.approx(100, abs=2)


def test_a_blend_tells_the_epochs_of_each_source(planned, tmp_path):
    prepare = ["prepare", "--out", str(tmp_path / "two"), "--train-tokenizer", "300", "--workers", "1"]
    for name, documents in (("few", 30), ("many", 90)):
        prepare += ["--source", f"{name}=text:{write_text(tmp_path / f'{name}.txt', documents)}"]
    assert main(prepare) == 0
    two = (f"data.path={tmp_path / 'two'}", "train.steps=20", "--no-measure")
    assert "epochs of" in planned(*two).out and "few:" not in planned(*two).out
    out = planned(*two, "data.weights={few: 0.75, many: 0.25}").out
    for name, share in (("few", 0.75), ("many", 0.25)):
        assert number(rf"(\d+)%  {name}: ", out) == 100 * share
        size = number(rf"{name}: [\d.]+ epochs of (\d+) samples", out)
        assert number(rf"{name}: ([\d.]+) epochs", out) == pytest.approx(20 * 6 * share / size, abs=0.01)


def test_a_run_that_exists_has_the_rest_to_do(data, tmp_path, capsys):
    given = [str(write_config(tmp_path, data)), "train.steps=5", "train.save_every=2"]
    assert main(["train", *given, "train.steps=3"]) == 0
    before = sorted((tmp_path / "runs").rglob("*"))
    for steps, left in ((5, 2), (2, 0)):
        capsys.readouterr()
        assert main(["plan", *given, f"train.steps={steps}", "--measure"]) == 0
        out = capsys.readouterr().out
        assert f"length: {steps} updates" in out
        assert f"  3 of them are in a checkpoint of {tmp_path / 'runs' / 'tiny'}, {left} remain\n" in out
        assert f" for the {left} that remain (h:mm:ss)" in out
    assert sorted((tmp_path / "runs").rglob("*")) == before, "nothing is written"


def test_time_is_measured_by_real_updates(planned):
    out = planned("train.steps=100", "--measure").out
    update = number(r"([\d.]+) s an update, 0:", out)
    tokens = number(r"6 samples, ([\d,]+) target tokens", out)
    assert number(r"([\d.]+)k? target tokens/s", out) * (1000 if "k target" in out else 1) == pytest.approx(
        tokens / update, rel=0.06
    )
    assert number(r"MFU (\d+)%", out) <= 100 and "measured here on cpu)" in out


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("optim.lrr=1", 3, "unknown key `optim.lrr`"),
        ("model.max_positions=16", 3, "`model.max_positions` must be at least"),
        ("batch.micro_max_tokens=16", 3, "`batch.micro_max_tokens` must be at least"),
        ("data.path=nowhere", 4, "data folder `nowhere`"),
        ("init_from=nowhere", 5, "nowhere"),
    ],
)
def test_what_train_would_refuse_is_refused(override, code, message, planned):
    err = planned(override, "--no-measure", code=code).err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_disk_too_small_for_the_checkpoints_is_an_error_below_the_table(planned, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    found = planned("--no-measure", code=6)
    assert "work: " in found.out and "must have room for 3 checkpoints" in found.err and found.err.count("\n") == 1


def test_a_machine_too_small_is_said_and_not_tried(planned, monkeypatch):
    monkeypatch.setattr(figures, "_capacity", lambda device, ranks: 1000)
    found = planned(code=3)
    out = found.out
    assert found.err.startswith("error: a rank must fit in 1 kB of memory, needs ") and found.err.count("\n") == 1
    assert "does NOT fit in 1 kB (this machine's memory" in out and "work: " in out
    assert "not measured, as it does not fit; --measure tries" in out
    monkeypatch.undo()
    monkeypatch.setattr(measure, "PATIENCE_SECONDS", 1e-9)
    assert re.search(r"not measured: it may take \d+:\d\d:\d\d \(h:mm:ss\) on", planned().out)


def test_memory_is_shared_by_ranks_and_limited_by_a_container(monkeypatch, tmp_path):
    import torch

    cpu = torch.device("cpu")
    assert figures._capacity(cpu, 4) == figures._capacity(cpu, 1) // 4
    (tmp_path / "memory.max").write_text("1000000\n")
    monkeypatch.setattr(figures, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert figures._capacity(cpu, 2) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert figures._capacity(cpu, 1) > 10**8
    assert planning._existing(tmp_path / "a" / "b") == tmp_path


def test_a_cluster_is_simulated_from_stated_assumptions(planned):
    shared = ("engine.kind=deepspeed", "engine.zero_stage=2", "engine.tensor_parallel=2", "engine.precision=bf16")
    out = planned(*shared, "--simulate", "2x4").out
    assert "8 GPUs = 4 data-parallel x 2 that share a model" in out and "not measured: 80 GB a GPU, 989 TFL" in out
    assert "= 4 rank(s) x" in out and "each of them 2 that share a model" in out
    assert "tensor parallel 2" in out and "B, fits in 80 GB of a GPU (assumed" in out
    assert "s an update if data-parallel messages hide" in out
    assert re.search(r"\n  2 of 80 GB: \S+ [kMG]B each, and each rank \S+ [kMG]B of its host's memory\n  2 of 141", out)
    assert re.search(r"\ndisk: \S+ [kM]B\n", out), "the disk of this machine is not that of the cluster"
    assert "between a GPU and its host:" not in out and "Adam" not in out, "nothing is offloaded"
    computing = number(r"time: (\S+) s computing", out)
    slower = planned(*shared, "--simulate", "2x4", "--assume", "reached=0.2", "--assume", "network_gb=5").out
    assert number(r"time: (\S+) s computing", slower) == pytest.approx(2 * computing, rel=0.02)
    assert number(r", (\S+) s among data-parallel ranks\n", slower) == pytest.approx(
        10 * number(r", (\S+) s among data-parallel ranks\n", out), rel=0.02
    )


CUT = ("engine.kind=deepspeed", "engine.zero_stage=3", "engine.precision=bf16")


def test_a_gpu_too_small_is_an_error_below_the_table_and_has_no_time(planned):
    found = planned(*CUT, "--simulate", "2x4", "--assume", "gpu=2.0001", code=3)
    assert "does NOT fit in 2 GB of a GPU (assumed" in found.out and "no time, as it does not fit\n" in found.out
    assert "tokens/s" not in found.out and "messages among data-parallel ranks: " in found.out
    assert found.err.startswith("error: a rank must fit in 100 kB of memory, needs ") and found.err.count("\n") == 1
    assert "not measured: 2.0001 GB a GPU" in found.out
    assert "not measured: 2.5 GB a GPU" in planned(*CUT, "--simulate", "2x4", "--assume", "gpu=2.5").out


def test_a_machine_holds_what_each_of_its_ranks_does(planned):
    out = planned(*CUT, "engine.offload=all", "--simulate", "2x4").out
    builds = number(r"each rank builds the whole model in the host's memory: ([\d.]+) kB", out)
    held = [float(size) for size in re.findall(r"([\d.]+) kB  [^\n]*, in the host's memory", out)]
    found = re.search(r"a node of 4 needs ([\d.]+) kB of memory to begin with, ([\d.]+) kB while it trains", out)
    assert len(held) == 5 and float(found[1]) == pytest.approx(4 * builds, rel=0.01)
    assert float(found[2]) == pytest.approx(4 * sum(held), rel=0.01)


def test_offload_costs_its_way_through_pcie_and_the_memory_of_the_host(planned):
    def read(*arguments):
        out = planned(*CUT, "train.steps=100000000", "--simulate", "2x4", *arguments).out
        parts = [float(seconds) for seconds in re.findall(r"(\S+) s (?:computing|among|between|Adam)", out)]
        return out, parts, number(r"\n  = (\S+) s an update", out), number(r"computing, (\S+) s if none does", out)

    *_, plain, _ = read()
    slow = ("--assume", "pcie_gb=0.001", "--assume", "host_gb=0.01")
    out, parts, least, most = read("engine.offload=all", *slow)
    micros = number(r"samples in (\d+) micro-batch", out)
    share = -(-number(r"parameters: ([\d,]+)", out) // 8)
    moved = 4 * (micros + 1) + 4 * micros + 2 * 2 * micros
    assert parts[3] == pytest.approx(moved * share / 1e6, rel=0.01)
    assert parts[4] == pytest.approx(4 * 42 * share / 1e7, rel=0.01), "four ranks share the memory"
    assert most == pytest.approx(sum(parts), rel=0.01)
    assert least == pytest.approx(max(parts[0] + parts[1], parts[2], parts[3]) + parts[4], rel=0.01) and least > plain
    hours = re.search(r" ([\d,.]+) to ([\d,.]+) GPU-hours", out)
    for found, update in zip(hours.groups(), (least, most), strict=True):
        assert float(found.replace(",", "")) == pytest.approx(update * 1e8 * 8 / 3600, rel=0.01)
    assert "0.001 GB/s between a GPU and its host, 0.01 GB/s of a machine's memory" in out


def test_each_model_sends_the_messages_of_its_own_batches_only(planned):
    shared = ("engine.kind=deepspeed", "engine.tensor_parallel=2")
    one, four = (
        number(r", (\S+) s among ranks that share", planned(*shared, "--simulate", size).out) for size in ("1x2", "2x4")
    )
    assert one == pytest.approx(4 * four, rel=0.02)


def test_a_short_run_has_its_hours_too(planned):
    out = planned("--simulate", "1x1", "train.steps=1").out
    assert " 0:00:00 to 0:00:00 for 1 updates (h:mm:ss), " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--simulate", "4"), "`--simulate` must be NODESxGPUS"),
        (
            ("--simulate", "1x2", "--assume", "peak=3"),
            "must be NAME=NUMBER of gpu, peak_tflops, reached, node_gb, network_gb, pcie_gb, host_gb",
        ),
        (("--simulate", "1x3", "engine.tensor_parallel=2"), "must divide the number of ranks (3), got 2"),
        (("--simulate", "1x4", "engine.tensor_parallel=4"), "`model.heads` must be a multiple of"),
    ],
)
def test_a_cluster_that_cannot_be(planned, arguments, message):
    assert message in planned(*arguments, code=3).err


def test_eleven_billion_parameters_are_planned_without_allocating_them(planned):
    shape = [
        f"model.{key}={value}"
        for key, value in {
            "d_model": 4096,
            "heads": 32,
            "ffn_dim": 16384,
            "encoder_layers": 24,
            "decoder_layers": 24,
        }.items()
    ]
    engine = ("engine.kind=deepspeed", "engine.precision=bf16", "engine.zero_stage=2")
    whole = planned(*shape, *engine, "--simulate", "1x8", "--assume", "gpu=141").out
    assert number(r"parameters: ([\d,]+)", whole) > 11e9
    alone = planned(*shape, *engine, "--simulate", "4x8", "engine.tensor_parallel=8").out
    weights = [number(r"([\d.]+) GB  weights\n", out) for out in (whole, alone)]
    assert weights[0] == pytest.approx(8 * weights[1], rel=0.02), "nearly every weight is cut"
