"""Rows 4, 5 and 6: attention of a NAR/AUX batch over SDPA with a dense mask, FlexAttention, and unmasked flash.

Rows of a sample: visible and MASK tokens, their truths, and a query for each MASK; half of the target is masked.

Shapes: B samples, R packed rows, K packed keys, T rows of a padded sample, S its keys, H heads, D head width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from gpu_harness import Bench, CannotRun, as_good
from harness import Row
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from parlance_kernels import SampleMask, backend, sample_attention

HEADS, WIDTH = 12, 64
Result = tuple[Tensor, ...]


def rows(bench: Bench) -> Iterator[Row]:
    """First lines of the issue's table; `aim` is what the design hopes for."""
    random = np.random.default_rng(0)
    if bench.small:
        long, short, ragged = [24] * 2, [8, 13], [9, 16]
    else:
        long, short, ragged = [512] * 16, random.integers(32, 129, 128).tolist(), random.integers(32, 257, 64).tolist()
    for name, lengths, dense, flex in (
        ("T=512", long, 3.0, 1.0),
        ("T<=128 ragged", short, 4.0, None),
        ("T<=256 ragged", ragged, None, 1.3),
    ):
        case = _Case(bench, lengths)
        exact = case.pack(case.exact())
        says = as_good(f"attention at {name}", case.ours(), case.pack(case.dense()), exact)
        detail = f"{name}, {len(lengths)} samples, half masked, {HEADS} x {WIDTH}; {says}"
        runs: list[Callable[[], object]] = [case.dense, case.ours]
        if flex is not None:  # its compiler takes its time for every shape
            try:
                says_flex = as_good(f"FlexAttention at {name}", case.pack(case.flex()), case.pack(case.dense()), exact)
                runs.append(case.flex)
            except (CannotRun, NotImplementedError, RuntimeError) as why:
                bench.skip(f"5 FlexAttention with a fresh BlockMask / ours, {name}", _short(why))
        try:
            says_library = as_good(f"library calls at {name}", case.library(), case.pack(case.dense()), exact)
            runs.append(case.library)
        except CannotRun as why:
            bench.skip(f"4 library calls merged by log-sum-exp / ours, {name}", why)
        equal = len(set(lengths)) == 1
        if equal:
            runs.append(case.flash)
        times = bench.times(runs, ahead=True)
        yield times.ratio(f"4 SDPA with dense mask / ours, {name}", 0, 1, dense, True, detail)
        if case.flex in runs:
            yield times.ratio(
                f"5 FlexAttention with a fresh BlockMask / ours, {name}",
                2,
                1,
                flex,
                True,
                f"{detail}; flex: {says_flex}",
            )
        if case.library in runs:
            at, told = runs.index(case.library), f"{detail}; library: {says_library}"
            yield times.ratio(f"4 library calls merged by log-sum-exp / ours, {name}", at, 1, None, True, told)
        if equal:
            useful = case.mask.visible_pairs() / case.flash_pairs
            told = f"useful pairs a second of ours over unmasked flash SDPA's, {useful:.3f} of its pairs; {detail}"
            yield times.ratio(f"6 useful rate / flash rate, {name}", len(runs) - 1, 1, 0.55, True, told, factor=useful)


def _short(why: BaseException) -> str:
    return f"{type(why).__name__}: {str(why).strip().splitlines()[0][:160] if str(why).strip() else 'no message'}"


def nar_aux(lengths: Sequence[int]) -> SampleMask:
    """Content rows, truths and queries of every sample; half of each target is masked."""
    segments, row, key = [], 0, 0
    for n in lengths:
        hidden = n // 2
        visible = n - hidden
        for count, prefix, window in ((n, n, 0), (hidden, visible, visible + 1), (hidden, visible, visible)):
            moving = (window, 1, hidden) if window else (0, 0, 0)
            segments.append((row, count, key, prefix, 0, *moving))
            row += count
        key += n + hidden
    return SampleMask.build(segments, key)


@dataclass(frozen=True)
class _Case:
    """One batch, packed for us and padded for the others, and all ways to attend, forward and backward."""

    bench: Bench
    lengths: Sequence[int]

    @cached_property
    def mask(self) -> SampleMask:
        return nar_aux(self.lengths)

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output."""
        sizes = self.mask.n_rows, self.mask.n_keys, self.mask.n_keys, self.mask.n_rows
        q, k, v, d = (self.bench.randn(n, HEADS, WIDTH, seed=seed) for seed, n in enumerate(sizes))
        return q, k, v, d

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where packed rows and keys lie in padded samples: bool [B, T] and [B, S]."""
        rows = torch.tensor([n + 2 * (n // 2) for n in self.lengths])
        keys = torch.tensor([n + n // 2 for n in self.lengths])
        row_BT = torch.arange(int(rows.max())) < rows[:, None]
        key_BS = torch.arange(int(keys.max())) < keys[:, None]
        return row_BT.to(self.bench.device), key_BS.to(self.bench.device)

    @cached_property
    def padded(self) -> list[Tensor]:
        """The same numbers as [B, H, T or S, D]."""
        row_BT, key_BS = self.places
        made = []
        for x, where in zip(self.packed, (row_BT, key_BS, key_BS, row_BT), strict=True):
            out = x.new_zeros(*where.shape, HEADS, WIDTH)
            out[where] = x
            made.append(out.transpose(1, 2).contiguous())
        return made

    @cached_property
    def bounds(self) -> list[Tensor]:
        """int32 [B, T]: end of the prefix, begin and end of the window of every row; rows of padding read key 0."""
        row_BT, _ = self.places
        first = torch.zeros(3, *row_BT.shape, dtype=torch.int32)
        first[0] = 1
        segments = list(self.mask)
        for index in range(len(self.lengths)):
            parts = segments[3 * index : 3 * index + 3]
            start = parts[0].row_start
            for s in parts:
                r = torch.arange(s.rows)
                begin = s.window_start + r * s.window_step
                ends = torch.stack([s.prefix + r * s.prefix_step, begin, begin + s.window_len])
                first[:, index, s.row_start - start : s.row_start - start + s.rows] = ends.to(torch.int32)
        return list(first.to(self.bench.device).unbind())

    @cached_property
    def dense_mask(self) -> Tensor:
        """bool [B, 1, T, S]."""
        _, key_BS = self.places
        key_S = torch.arange(key_BS.shape[1], device=self.bench.device)
        end, begin, stop = (x[:, :, None] for x in self.bounds)
        return ((key_S < end) | ((key_S >= begin) & (key_S < stop)))[:, None]

    def ours(self) -> Result:
        """A mask made anew, as every step has one; only its check is left out."""
        *qkv, d = self.packed
        mask = SampleMask(self.mask.table.copy(), self.mask.n_keys)
        return _both(lambda q, k, v: sample_attention(q, k, v, mask, backend=self.bench.backend), qkv, d)

    def library(self) -> Result:
        """The same by flash attention's variable-length calls, their plan made anew.

        Raises:
            CannotRun: torch has no flash attention here.
        """
        if why := backend.problem("library"):
            raise CannotRun(why)
        *qkv, d = self.packed
        mask = SampleMask(self.mask.table.copy(), self.mask.n_keys)
        return _both(lambda q, k, v: sample_attention(q, k, v, mask, backend="library"), qkv, d)

    def dense(self) -> Result:
        """The mask is ready before; the released code makes it in every step."""
        *qkv, d = self.padded
        return _both(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, self.dense_mask), qkv, d)

    def exact(self) -> Result:
        """In fp32."""
        *qkv, d = (x.float() for x in self.padded)
        return _both(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, self.dense_mask), qkv, d)

    def flash(self) -> Result:
        """All of the target's rows read all of its keys, without a mask."""
        n = self.lengths[0]
        *qkv, d = (x[:, :, :n] for x in self.padded)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return _both(F.scaled_dot_product_attention, qkv, d)

    @property
    def flash_pairs(self) -> int:
        return len(self.lengths) * self.lengths[0] ** 2

    def flex(self) -> Result:
        """FlexAttention, its BlockMask made anew.

        Raises:
            CannotRun: on a CPU, where it has no backward; its forward is checked all the same.
        """
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        end, begin, stop = self.bounds

        def reads(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k < end[b, q]) | ((k >= begin[b, q]) & (k < stop[b, q]))

        (batch, _, t, _), s = self.padded[0].shape, self.padded[1].shape[2]
        if not self.bench.cuda:
            q, k, v, _ = self.padded
            block = create_block_mask(reads, batch, None, t, s, device="cpu")
            row_BT, _ = self.places
            found = flex_attention(q, k, v, block_mask=block).transpose(1, 2)[row_BT]
            as_good("FlexAttention's forward", [found], [found], self.pack(self.exact())[:1], floor=1e-2)
            raise CannotRun("it has no backward on a CPU")
        block = _compiled(create_block_mask)(reads, batch, None, t, s, device=self.bench.device)
        *qkv, d = self.padded
        return _both(lambda q, k, v: _compiled(flex_attention)(q, k, v, block_mask=block), qkv, d)

    def pack(self, made: Result) -> Result:
        """Output and gradients of the rows and keys that are real."""
        row_BT, key_BS = self.places
        wheres = row_BT, row_BT, key_BS, key_BS
        return tuple(x.transpose(1, 2)[where] for x, where in zip(made, wheres, strict=True))


_made: dict[Any, Any] = {}


def _compiled(function: Any) -> Any:
    if function not in _made:
        _made[function] = torch.compile(function, dynamic=False)
    return _made[function]


def _both(attend: Callable[..., Tensor], qkv: Sequence[Tensor], d: Tensor) -> Result:
    given = [x.detach().requires_grad_() for x in qkv]
    o = attend(*given)
    return (o.detach(), *torch.autograd.grad(o, given, d))
