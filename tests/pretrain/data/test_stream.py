"""The stream: one order of samples and draws for every world and worker count, balanced plans, clear errors."""

import multiprocessing
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import BatchConfig, validate
from pretrain.data.dataset import ShardDataset
from pretrain.data.order import BlendedOrder
from pretrain.data.plan import BatchSize, plan_step
from pretrain.data.stream import SampleStream, ShardCorpus, Window
from pretrain.errors import ConfigError, DataError
from pretrain.objectives.base import Example, Objective


@dataclass
class Trace:
    """A batch that only remembers what it was made of."""

    ids: torch.Tensor
    draws: torch.Tensor
    n_samples: int
    n_tokens: int
    pid: int = field(default_factory=os.getpid)
    threads: int = field(default_factory=torch.get_num_threads)

    def to(self, device: torch.device) -> "Trace":
        return self


class TraceObjective:
    weights: Mapping[str, float] = {"trace": 1.0}

    def corrupt(self, tokens: np.ndarray, sentences: np.ndarray, rng: np.random.Generator) -> Example:
        target = np.concatenate([[0], tokens, [2]]).astype(np.int64)
        return Example(rng.integers(0, 2**60, 1), target, np.empty(0, np.int64))

    def collate(self, examples: Sequence[Example]) -> Trace:
        ids = torch.tensor([hash(e.target.tobytes()) for e in examples], dtype=torch.int64)
        draws = torch.tensor([int(e.source[0]) for e in examples], dtype=torch.int64)
        return Trace(ids, draws, len(examples), sum(len(e.target) for e in examples))


TRACE = cast(Objective, TraceObjective())


class CountingCorpus:
    """Synthetic: sample i of source s has length 3 + (7 i + s) mod 28 and its ids as tokens."""

    def __init__(self, sizes: list[int], fail_at: int = -1) -> None:
        self.sizes, self.longest, self.fail_at = sizes, 30, fail_at

    def length(self, source: int, index: int) -> int:
        return 3 + (7 * index + source) % 28

    def example(self, source: int, index: int, rng: np.random.Generator, objective: Any) -> Example:
        if index == self.fail_at:
            raise DataError("shard `x-000003.tar` ends too early")
        return objective.corrupt(
            np.full(self.length(source, index) - 2, 1000 * source + index), np.zeros(1, np.int32), rng
        )


def stream(workers: int = 0, **batch: Any) -> SampleStream:
    size = BatchSize(batch.get("samples"), batch.get("tokens"), batch.get("micro", 64))
    return SampleStream(CountingCorpus([300, 100]), TRACE, seed=11, batch=size, workers=workers)


def traces(window: Window) -> list[Trace]:
    return cast(list[Trace], window.batches)


def content(windows: Sequence[Window]) -> list[tuple[int, int]]:
    """Sorted (sample, draw) of all ranks' batches of one update."""
    return sorted((int(i), int(d)) for w in windows for b in traces(w) for i, d in zip(b.ids, b.draws, strict=True))


@pytest.mark.parametrize("batch", [{"samples": 90}, {"tokens": 1500}])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_order_and_draws_are_the_same_for_any_world_and_workers(workers: int, batch: dict) -> None:
    def updates(position: int, world: int, n: int, workers: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
        ranks = [list(islice(stream(workers, **batch).windows(position, r, world), n)) for r in range(world)]
        out = []
        for per_rank in zip(*ranks, strict=True):
            assert len({(w.first, w.count, len(w.batches)) for w in per_rank}) == 1
            out.append((per_rank[0].first, per_rank[0].count, content(per_rank)))
        return out

    reference = updates(0, 1, 6, 0)
    for world in (1, 2, 4) if workers else (1, 2, 4, 64):
        assert updates(0, world, 6, workers) == reference
    resumed = updates(reference[3][0], 2, 3, workers)
    assert resumed == reference[3:]
    # 6 updates of 90 pass the 400 samples: the second epoch draws anew
    assert len({draw for _, _, update in reference for _, draw in update}) == sum(count for _, count, _ in reference)


def test_global_order_of_positions_for_64_simulated_ranks() -> None:
    source = stream(samples=128)
    runs = []
    for world in (1, 2, 4, 64):
        position, order = 0, []
        for _ in range(8):
            plan = source.plan_step(position, world)
            placed = sorted(at for rank in plan.micro for one in rank for at in one)
            order += [plan.samples[at - plan.first] for at in placed]
            position += plan.count
        runs.append(order)
    assert runs[0] == runs[1] == runs[2] == runs[3] and len(runs[0]) == 8 * 128
    assert sorted(runs[0][:400]) == [(s, i) for s, n in ((0, 300), (1, 100)) for i in range(n)]


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 300), st.integers(1, 70), st.integers(30, 400), st.booleans(), st.integers(0, 10**6))
def test_plans_are_complete_balanced_and_within_limits(
    size: int, world: int, micro: int, by_tokens: bool, position: int
) -> None:
    corpus = CountingCorpus([200, 50])
    order = BlendedOrder(corpus.sizes, None, 3)
    batch = BatchSize(None, size + 30, micro) if by_tokens else BatchSize(size, None, micro)
    plan = plan_step(order, corpus, position, world, batch)
    lengths = [corpus.length(*sample) for sample in plan.samples]
    assert plan.tokens == sum(lengths)
    if by_tokens:
        following = corpus.length(*order.locate(position + plan.count))
        assert plan.tokens <= size + 30 < plan.tokens + following
    else:
        assert plan.count == size
    placed = sorted(at for rank in plan.micro for one in rank for at in one)
    assert placed == list(range(position, position + plan.count)) and len(plan.micro) == world
    assert len({len(rank) for rank in plan.micro}) == 1
    loads = [[sum(lengths[at - position] for at in one) for one in rank] for rank in plan.micro]
    assert max(max(rank) for rank in loads) <= micro
    ranks = [sum(rank) for rank in loads]
    assert max(ranks) - min(ranks) <= max(lengths)


def test_workers_are_processes_with_one_thread_and_end_with_the_stream() -> None:
    windows = stream(2, samples=90).windows(0, 0, 1)
    batches = traces(next(windows))
    assert os.getpid() not in {b.pid for b in batches} and len({b.pid for b in batches}) == 2
    assert {b.threads for b in batches} == {1}
    windows.close()
    for pid in {b.pid for b in batches}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_outlive_a_stop_signal_to_the_group_but_not_their_rank() -> None:
    windows = stream(2, samples=90).windows(0, 0, 1)
    pids = {b.pid for b in traces(next(windows))}
    for pid in pids:
        for number in ("TERM", "USR1", "INT"):
            subprocess.run(["kill", f"-{number}", str(pid)], check=True)
    assert {b.pid for w in islice(windows, 20) for b in traces(w)} == pids
    for process in multiprocessing.active_children():
        process.terminate()
        process.join(5)
        assert process.exitcode == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_keeps_its_type_and_its_line(workers: int) -> None:
    source = SampleStream(
        CountingCorpus([40], fail_at=7), TRACE, seed=1, batch=BatchSize(40, None, 64), workers=workers
    )
    with pytest.raises(DataError, match=r"^shard `x-000003\.tar` ends too early$"):
        next(source.windows(0, 0, 1))
    assert not multiprocessing.active_children()


def test_real_shards_give_every_sample_and_fixed_validation(prepared: Path) -> None:
    dataset = ShardDataset(prepared)
    train, valid = ShardCorpus(dataset, "train"), ShardCorpus(dataset, "valid")
    n = sum(train.sizes)

    def build(seed: int) -> SampleStream:
        return SampleStream(train, TRACE, seed=seed, batch=BatchSize(n, None, 256), valid=valid, workers=1)

    window = next(build(5).windows(0, 0, 1))
    targets = [np.concatenate([[0], dataset.tokens(i), [2]]) for ids in dataset.sources("train").values() for i in ids]
    assert sorted(i for i, _ in content([window])) == sorted(hash(t.astype(np.int64).tobytes()) for t in targets)
    assert build(5).epoch(n) == 1

    def fixed_batches(seed: int, rank: int = 0, world: int = 1) -> list[Trace]:
        return cast(list[Trace], build(seed).fixed_batches(4, rank, world))

    fixed = fixed_batches(5)
    assert len(fixed) == 4 and all(0 < b.n_tokens <= 256 for b in fixed)
    assert all(torch.equal(a.draws, b.draws) for a, b in zip(fixed, fixed_batches(6), strict=True))
    ranks = [fixed_batches(5, rank, 3) for rank in range(3)]
    assert [len(r) for r in ranks] == [2, 2, 2]
    assert sorted(d for r in ranks for b in r for d in b.draws.tolist()) == sorted(
        d for b in fixed for d in b.draws.tolist()
    )
    assert build(5).preview(3).n_samples == 3
    whole = build(5).fixed_batches(10**6)
    assert sum(b.n_samples for b in whole) == sum(valid.sizes)


def test_errors_before_the_first_step() -> None:
    with pytest.raises(DataError, match="each of 401 ranks, got 400"):
        stream(samples=8).windows(0, 0, 401)
    with pytest.raises(ConfigError, match=r"micro_max_tokens` must be at least the longest sample, 30 tokens, got 29"):
        stream(samples=8, micro=29)
    with pytest.raises(ConfigError, match=r"batch\.tokens"):
        stream(tokens=20)
    with pytest.raises(DataError, match="validation split is empty"):
        stream(samples=8).fixed_batches(2)
    with pytest.raises(ConfigError, match="exactly one"):
        validate(BatchConfig, {"samples": 8, "tokens": 80}, where="batch")
    assert stream(samples=8).preview(5).n_samples == 5
