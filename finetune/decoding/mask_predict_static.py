"""Mask-predict in fixed shapes, for CUDA graphs: the texts of `mask_predict`, which says what is computed.

One graph reads the sources. Their lengths come to the host once, for the number of columns. Then each pass is a graph:
what it hides next is chosen on the device, from how many passes are left there. Passes that write few tokens run the
last layer and the vocabulary on fewer rows, in a graph of their own.

Shapes: B sources, K lengths a source, C = B * K candidates, S tokens of the longest source, T columns of a candidate,
W columns that a pass may write, N length classes, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from finetune.decoding.common import Generated, check_length, most_likely
from finetune.decoding.graphs import FEWEST_TOKENS, Graphed, PaddedSources, Shapes, bucket, filled
from finetune.decoding.length import EMPTY, candidate_lengths
from finetune.decoding.mask_predict import MaskPredictOptions, hidden_count
from pretrain.models import EncoderDecoder, SourceRows, static
from pretrain.models.encoder_decoder import writing


class StaticMaskPredict:
    """`mask_predict` of one model with these options; keeps a graph of each shape it meets."""

    def __init__(self, model: EncoderDecoder, options: MaskPredictOptions) -> None:
        check_length(model, options.max_length)
        self.model, self.options = model, options
        self.reading = Shapes(partial(_Reading, model, options), partial(PaddedSources.size, model))
        self.longest = min(options.max_length, model.config.length_classes - 1)

    def __call__(self, source: SourceRows) -> Generated:
        """As `mask_predict`."""
        if not source.n_samples:
            return Generated([], [], 0)
        options = self.options
        with writing(self.model):
            reading = filled(self.reading, source)
            reading.read()
            logits_BN = reading.lengths_BN[: source.n_samples]
            length_BK = candidate_lengths(logits_BN, options.length_beam, options.length_choice, self.longest)
            columns = bucket(int(length_BK.max()), FEWEST_TOKENS)
            return reading.candidates(length_BK.shape[1], columns).write(length_BK)


class _Reading:
    """Sources of one shape: the buffers, and the graph that encodes them and predicts lengths."""

    def __init__(self, model: EncoderDecoder, options: MaskPredictOptions, sources: int, width: int) -> None:
        self.model, self.sources = model, PaddedSources(model, sources, width)
        self.lengths_BN = model.shared.weight.new_zeros(sources, model.config.length_classes)
        self.read = Graphed(self._read, self.lengths_BN.device)
        self.candidates = Shapes(partial(_Candidates, self, options))

    def _read(self) -> None:
        self.lengths_BN.copy_(static.length_logits(self.model, *self.sources.read()))


class _Candidates:
    """Buffers for all candidates of one shape, as `mask_predict._Candidates` has them, and the graphs of a pass.

    order_CT: columns of content, the least probable first; the first `hidden_C` of them are hidden. left: int64 [],
    passes to come.
    """

    def __init__(self, reading: _Reading, options: MaskPredictOptions, per_source: int, columns: int) -> None:
        self.model, self.sources, self.options = reading.model, reading.sources, options
        self.per_source, self.columns, self.total = per_source, columns, options.iterations + 1
        ids, device = self.model.ids, reading.lengths_BN.device
        shape = len(reading.lengths_BN) * per_source, columns
        self.banned_V = torch.tensor([*ids.never_written, ids.eos], device=device)
        self.length_C = torch.full(shape[:1], EMPTY, device=device)
        self.tokens_CT = torch.full(shape, ids.pad, device=device)
        self.score_CT = torch.zeros(
            shape, dtype=torch.promote_types(self.model.shared.weight.dtype, torch.float32), device=device
        )
        self.order_CT = torch.zeros(shape, dtype=torch.int64, device=device)
        self.hidden_C = torch.zeros_like(self.length_C)
        self.finished_C = torch.zeros(shape[:1], dtype=torch.bool, device=device)
        self.left = torch.zeros((), dtype=torch.int64, device=device)
        self.first = Graphed(self._first, device)
        self.later = Shapes(self._pass_of)

    def write(self, length_BK: Tensor) -> Generated:
        """The texts for candidates of these lengths, of the sources that were read. length_BK: on the host."""
        length_C = length_BK.flatten()
        spare = len(self.length_C) - len(length_C)
        self.length_C.copy_(torch.nn.functional.pad(length_C, (0, spare), value=EMPTY))
        longest, rewrite_all = int(length_C.max()), self.options.rewrite == "all"
        for done in range(1, self.total + 1):
            if done == 1:
                self.first()
            else:
                hidden = hidden_count(longest - EMPTY, done - 1, self.total)
                self.later(self.columns if rewrite_all else min(self.columns, bucket(hidden, FEWEST_TOKENS)))()
            if self.options.early_stop and bool(self.finished_C[: len(length_C)].all()):
                break
        return self._best(length_BK, passes=done)

    def _pass_of(self, width: int) -> Graphed:
        run: Callable[[], None] = self._rewrite if width == self.columns else partial(self._write_some, width)
        return Graphed(run, self.left.device)

    def _content_CT(self) -> Tensor:
        column_T = torch.arange(self.columns, device=self.left.device)
        return (column_T > 0) & (column_T < self.length_C[:, None] - 1)

    def _hidden_CT(self) -> Tensor:
        lowest_CT = static.inside(self.hidden_C, self.columns)
        return torch.zeros_like(lowest_CT).scatter(1, self.order_CT, lowest_CT)

    def _first(self) -> None:
        """Begins, and writes all content."""
        ids, content_CT = self.model.ids, self._content_CT()
        column_T = torch.arange(self.columns, device=self.left.device)
        self.tokens_CT.fill_(ids.pad).masked_fill_(column_T == self.length_C[:, None] - 1, ids.eos)
        self.tokens_CT[:, 0].fill_(ids.bos)
        self.score_CT.zero_()
        self.finished_C.zero_()
        self.left.fill_(self.total)
        self._write(content_CT, content_CT)

    def _rewrite(self) -> None:
        """Any later pass; the vocabulary is computed for every column."""
        hidden_CT = self._hidden_CT()
        written_CT = self._content_CT() if self.options.rewrite == "all" else hidden_CT
        self._write(hidden_CT, written_CT & ~self.finished_C[:, None])

    def _write(self, hidden_CT: Tensor, written_CT: Tensor) -> None:
        token_CT, score_CT = self._predict(hidden_CT, None)
        before_CT = self.tokens_CT.clone()
        self.tokens_CT.copy_(torch.where(written_CT, token_CT, before_CT))
        self.score_CT.copy_(torch.where(written_CT, score_CT, self.score_CT))
        self._hide(before_CT)

    def _write_some(self, width: int) -> None:
        """A later pass that writes `width` columns of a candidate at most."""
        at_CW, written_CW = self.order_CT[:, :width], static.inside(self.hidden_C, width)
        token_CW, score_CW = self._predict(self._hidden_CT(), at_CW)
        before_CT = self.tokens_CT.clone()
        self.tokens_CT.scatter_(1, at_CW, torch.where(written_CW, token_CW, before_CT.gather(1, at_CW)))
        self.score_CT.scatter_(1, at_CW, torch.where(written_CW, score_CW, self.score_CT.gather(1, at_CW)))
        self._hide(before_CT)

    def _predict(self, hidden_CT: Tensor, at_CW: Tensor | None) -> tuple[Tensor, Tensor]:
        """(token, log-probability) for the columns at_CW, or for all."""
        tokens_CT = self.tokens_CT.masked_fill(hidden_CT, self.model.ids.mask)
        inside_CT = static.inside(self.length_C, self.columns)
        h_CWD = static.decode(
            self.model, tokens_CT, inside_CT, self.sources.memory, self.sources.bias_B11S, used_CW=at_CW
        )
        token_L, score_L = most_likely(self.model, h_CWD.flatten(0, 1), self.banned_V)
        return token_L.view(h_CWD.shape[:2]), score_L.view(h_CWD.shape[:2]).to(self.score_CT.dtype)

    def _hide(self, before_CT: Tensor) -> None:
        """Finishes candidates that are as they were, and chooses what the next pass does not see of the others."""
        if self.total == 1:
            return
        if self.options.early_stop:
            self.finished_C |= (self.tokens_CT == before_CT).all(dim=1)
        self.left -= 1
        hidden_C = (self.length_C - EMPTY) * self.left // self.total
        self.hidden_C.copy_(hidden_C.masked_fill(self.finished_C, 0))
        order_CT = self.score_CT.masked_fill(~self._content_CT(), torch.inf).argsort(dim=1, stable=True)
        self.order_CT.copy_(order_CT)

    def _best(self, length_BK: Tensor, passes: int) -> Generated:
        """The candidate of highest mean log-probability of each source."""
        length_C, count = length_BK.flatten(), length_BK.numel()
        mean_BK = (self.score_CT[:count].sum(dim=1).cpu() / length_C).view(length_BK.shape)
        chosen_B = (mean_BK.argmax(dim=1) + torch.arange(len(mean_BK)) * self.per_source).tolist()
        tokens_CT = self.tokens_CT[:count].cpu().numpy()
        tokens = [tokens_CT[c, 1 : int(length_C[c]) - 1].copy() for c in chosen_B]
        return Generated(tokens, mean_BK.max(dim=1).values.tolist(), passes)
