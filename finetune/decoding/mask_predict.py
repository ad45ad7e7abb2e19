"""Mask-predict: write all tokens at once, then hide the least certain ones and write those again.

T = iterations + 1 decoder passes: `iterations` counts refinements after the first pass, as the papers count. After
pass t the floor(N (T - t) / T) least probable of the N content tokens are hidden (Ghazvininejad et al. 2019).

Shapes: B sources, K lengths a source, C candidates (source x length), A candidates with something to write, T tokens
of the longest candidate, R packed rows, L written rows, M memory rows, D width.
"""

from typing import Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from finetune.decoding.common import USUAL_LENGTH, Generated, check_length, most_likely
from finetune.decoding.length import EMPTY, LengthChoice, candidate_lengths
from parlance_kernels import SampleMask
from pretrain.config import Section
from pretrain.models import DecoderRows, EncoderDecoder, SourceRows
from pretrain.models.encoder_decoder import writing
from pretrain.models.incremental import KeysValues, decode_over, project_memory

CountT = TypeVar("CountT", int, np.ndarray)


class MaskPredictOptions(Section):
    """iterations: refinements after the first pass. length_beam, length_choice: candidate lengths per source.

    max_length: longest candidate in tokens, with BOS and EOS. early_stop: a candidate is finished once a pass leaves
    all its tokens as they were; saves passes, and may change a text that a later pass would have reopened.
    rewrite: what a pass writes: the `hidden` tokens, or `all`, which is for models that have learned to correct (CMLMC,
    section 3.2); null: as the bundle was tuned, the hidden ones where nobody knows.
    """

    iterations: int = Field(4, ge=0, le=1000)
    length_beam: int = Field(3, ge=1, le=100)
    length_choice: LengthChoice = "contiguous"
    max_length: int = Field(USUAL_LENGTH, ge=3)
    early_stop: bool = False
    rewrite: Literal["hidden", "all"] | None = None


def hidden_count(content: CountT, done: int, total: int) -> CountT:
    """Tokens to hide after pass `done` of `total` over `content` tokens: floor(content (total - done) / total).

    In integers, because floats lose one token where the quotient is whole.
    """
    return content * (total - done) // total


def mask_predict(model: EncoderDecoder, source: SourceRows, options: MaskPredictOptions) -> Generated:
    """Texts for packed sources; the best candidate length of each source wins.

    Score: mean log-probability over the length with BOS and EOS, which count 0. Special ids are never written.
    Every pass calls the decoder, even if nothing is hidden any more: without `early_stop`, passes = iterations + 1.

    Raises:
        ConfigError: if `max_length` exceeds the model's positions.
    """
    check_length(model, options.max_length)
    if not source.n_samples:
        return Generated([], [], 0)
    longest = min(options.max_length, model.config.length_classes - 1)
    with writing(model):
        memory_MD = model.encode(source)
        lengths_BN = model.length_logits(memory_MD, source)
        lengths_BK = candidate_lengths(lengths_BN, options.length_beam, options.length_choice, longest)
        memory = project_memory(model, memory_MD)
        candidates = _Candidates(model, source, memory, lengths_BK.numpy(), options.rewrite == "all")
        total = options.iterations + 1
        for done in range(1, total + 1):
            before_CT = candidates.tokens_CT.clone()
            candidates.predict()
            # Compared before tokens are hidden again, so that a finished text holds no MASK.
            if options.early_stop and candidates.finish(before_CT):
                break
            candidates.hide(done, total)
        return candidates.best(passes=done)


class _Candidates:
    """All candidates of a batch.

    tokens_CT: int64, complete texts but for the hidden tokens, padded; score_CT: log-probability of each content
    token when it was written, 0 elsewhere; hidden_CT: what the next pass does not see; written_CT: what it predicts,
    `n_written_C` tokens each.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        source: SourceRows,
        memory: list[KeysValues],
        lengths_BK: np.ndarray,
        rewrite_all: bool,
    ) -> None:
        self.model, self.memory, self.n_memory = model, memory, source.mask.n_rows
        self.rewrite_all = rewrite_all
        sources, self.per_source = lengths_BK.shape
        self.range_C2 = np.repeat([source.memory_range(b) for b in range(sources)], self.per_source, axis=0)
        self.length_C = lengths_BK.reshape(-1)
        self.finished_C = np.zeros(len(self.length_C), bool)
        self.device = memory[0][0].device
        ids = model.ids
        column_T = torch.arange(int(self.length_C.max()), device=self.device)
        length_C1 = self._tensor(self.length_C)[:, None]
        self.outside_CT = column_T >= length_C1
        self.content_CT = (column_T > 0) & (column_T < length_C1 - 1)
        self.tokens_CT = torch.full_like(self.outside_CT, ids.pad, dtype=torch.int64)
        self.tokens_CT[:, 0] = ids.bos
        self.tokens_CT[column_T == length_C1 - 1] = ids.eos
        dtype = torch.promote_types(model.shared.weight.dtype, torch.float32)
        self.score_CT = torch.zeros_like(self.outside_CT, dtype=dtype)
        self.hidden_CT = self.written_CT = self.content_CT
        self.n_written_C = self.length_C - EMPTY

    def predict(self) -> None:
        """One decoder pass: writes tokens and their log-probabilities."""
        ids = self.model.ids
        rows, cell_R = self._rows()
        h_LD = decode_over(self.model, rows, self.memory)
        token_L, score_L = most_likely(self.model, h_LD, [*ids.never_written, ids.eos])
        cell_L = cell_R[rows.out_L]
        self.tokens_CT.view(-1)[cell_L] = token_L
        self.score_CT.view(-1)[cell_L] = score_L.to(self.score_CT.dtype)

    def finish(self, before_CT: Tensor) -> bool:
        """Freezes candidates that the last pass left as they were in `before_CT`; True if all are frozen."""
        self.finished_C |= (self.tokens_CT == before_CT).all(dim=1).cpu().numpy()
        return bool(self.finished_C.all())

    def hide(self, done: int, total: int) -> None:
        """Hides the least probable content tokens, the leftmost first among equals."""
        content_C = self.length_C - EMPTY
        n_hidden_C = np.where(self.finished_C, 0, hidden_count(content_C, done, total))
        order_CT = self.score_CT.masked_fill(~self.content_CT, torch.inf).argsort(dim=1, stable=True)
        lowest_CT = torch.arange(order_CT.shape[1], device=self.device) < self._tensor(n_hidden_C)[:, None]
        self.hidden_CT = torch.zeros_like(self.outside_CT).scatter(1, order_CT, lowest_CT)
        if self.rewrite_all:
            self.n_written_C = np.where(self.finished_C, 0, content_C)
        else:
            self.written_CT, self.n_written_C = self.hidden_CT, n_hidden_C

    def best(self, passes: int) -> Generated:
        """The candidate of highest mean log-probability of each source."""
        mean_C = self.score_CT.sum(dim=1) / self._tensor(self.length_C)
        mean_BK = mean_C.view(-1, self.per_source).cpu()
        chosen_B = mean_BK.argmax(dim=1).numpy() + np.arange(len(mean_BK)) * self.per_source
        tokens_CT = self.tokens_CT.cpu().numpy()
        tokens = [tokens_CT[c, 1 : self.length_C[c] - 1] for c in chosen_B]
        return Generated(tokens, mean_BK.max(dim=1).values.tolist(), passes)

    def _rows(self) -> tuple[DecoderRows, Tensor]:
        """Rows [kept | written] of every candidate with something to write, and the cell of tokens_CT each stands for.

        Tables come from lengths and counts that the host knows; only the order of the rows is read on the device.
        """
        width = self.tokens_CT.shape[1]
        active_A = np.flatnonzero(self.n_written_C)
        length_A, written_A = self.length_C[active_A], self.n_written_C[active_A]
        start_A, out_start_A = np.cumsum(length_A) - length_A, np.cumsum(written_A) - written_A
        within_R = np.arange(length_A.sum()) - np.repeat(start_A, length_A)
        out_L = np.arange(written_A.sum()) + np.repeat(start_A + length_A - written_A - out_start_A, written_A)
        rank_CT = self.written_CT.to(torch.uint8) + 2 * self.outside_CT.to(torch.uint8)
        order_CT = rank_CT.argsort(dim=1, stable=True)
        row_R = np.repeat(active_A, length_A) * width
        positions_R = order_CT.view(-1)[self._tensor(row_R + within_R)]
        cell_R = self._tensor(row_R) + positions_R
        tokens_R = self.tokens_CT.masked_fill(self.hidden_CT, self.model.ids.mask).view(-1)[cell_R]
        n_keys, memory = len(within_R), (self.range_C2[active_A, 0], self.range_C2[active_A, 1])
        rows = DecoderRows(
            tokens_R,
            positions_R,
            n_keys,
            _full(start_A, length_A, start_A, length_A, n_keys),
            _full(start_A, length_A, *memory, self.n_memory),
            self._tensor(out_L),
            _full(out_start_A, written_A, start_A, length_A, n_keys),
            _full(out_start_A, written_A, *memory, self.n_memory),
        )
        return rows, cell_R

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def _full(row_start: np.ndarray, rows: np.ndarray, key_start: np.ndarray, keys: np.ndarray, n_keys: int) -> SampleMask:
    """Segments whose rows all read the same keys; neighbours that read the same memory become one."""
    nothing = np.zeros_like(rows)
    table = np.stack([row_start, rows, key_start, keys, nothing, nothing, nothing, nothing], axis=1)
    return SampleMask.build(table.tolist(), n_keys).merged()
