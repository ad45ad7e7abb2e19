"""Beam search in fixed shapes, for CUDA graphs: the texts of `beam_search`, which states the rules.

One graph reads the sources and begins; then every token is a graph, the same each time: how many tokens there are is a
number on the device. Finished sources stay and are computed on, because nothing may become smaller; what they say is
not looked at. Whether all have finished the host learns one step late, so that the GPU never waits for it.

Shapes: B sources, K hypotheses of each, N = B * K, C = 2 K continuations, L slots for tokens, R results, S tokens of
the longest source, D width, V vocabulary.
"""

from functools import partial

import torch
from torch import Tensor

from finetune.decoding.beam import Ended, first_open
from finetune.decoding.common import Generated, check_length
from finetune.decoding.graphs import Graphed, PaddedSources, Shapes, filled
from finetune.decoding.left_to_right import ArDecoding, score_dtype
from pretrain.models import EncoderDecoder, SourceRows, static
from pretrain.models.encoder_decoder import writing
from pretrain.models.incremental import StreamName
from pretrain.models.patterns import ArLayout
from pretrain.models.static import BeamCache

WIDEST = 16  # beam: each hypothesis looks at the slots of all, which is free while they are few


def supports(options: ArDecoding) -> bool:
    """Whether there is a form in fixed shapes for these options."""
    return not options.sample and not options.no_repeat_ngram and options.beam <= WIDEST


class StaticBeamSearch:
    """`beam_search` of one model with these options; keeps the graphs of each shape it meets."""

    def __init__(self, model: EncoderDecoder, layout: ArLayout, stream: StreamName, options: ArDecoding) -> None:
        check_length(model, options.max_length)
        self.model, self.options = model, options
        self.searches = Shapes(partial(_Search, model, layout, stream, options), self._size)

    def __call__(self, source: SourceRows) -> Generated:
        """As `beam_search`."""
        if not source.n_samples:
            return Generated([], [], 0, n_best=self.options.n_best)
        with writing(self.model):
            search = filled(self.searches, source)
            return search.write(source.n_samples)

    def _size(self, sources: int, width: int) -> int:
        past = static.keys_values_bytes(self.model, sources * self.options.beam * self.options.max_length)
        return PaddedSources.size(self.model, sources, width) + past


class _Search:
    """Buffers for a beam over sources of one shape, and its two graphs.

    history_BKL: tokens from the first that is not forced. step: int64 [1], how many of them there are. open_B: sources
    that go on. score_BK: sums of log-probabilities, -inf where there is no hypothesis.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        layout: ArLayout,
        stream: StreamName,
        options: ArDecoding,
        sources: int,
        width: int,
    ) -> None:
        device, shape = model.shared.weight.device, (sources, options.beam)
        slots = -(-options.max_length // 8) * 8  # as fused attention wants its masks
        self.model, self.options = model, options
        *self.forced, self.start = layout.start
        self.steps = options.max_length - 1
        self.sources = PaddedSources(model, sources, width)
        self.cache = BeamCache(model, layout, stream, *shape, slots)
        self.history_BKL = torch.zeros(*shape, slots, dtype=torch.int64, device=device)
        self.step = torch.ones(1, dtype=torch.int64, device=device)
        self.passes = torch.zeros(1, dtype=torch.int64, device=device)
        self.score_BK = torch.zeros(shape, dtype=score_dtype(model), device=device)
        self.open_B = torch.zeros(sources, dtype=torch.bool, device=device)
        self.going = torch.zeros(1, dtype=torch.bool, device=device)
        self.ended = Ended.none(sources, options, device, slots)
        banned_V = torch.zeros(len(model.shared.weight), dtype=torch.bool)
        banned_V[model.ids.never_written] = True
        self.banned_V = banned_V.to(device)
        self.not_eos_V = torch.arange(len(banned_V), device=device) != model.ids.eos
        self.begin, self.advance = Graphed(self._begin, device), Graphed(self._advance, device)
        self.told = [torch.zeros(1, dtype=torch.bool, pin_memory=device.type == "cuda") for _ in range(2)]

    def write(self, n_samples: int) -> Generated:
        """Texts for the first `n_samples` of the sources that were filled in."""
        self.begin()
        before: torch.cuda.Event | None = None
        for step in range(self.steps):
            self.advance()
            told = self.told[step % 2]
            told.copy_(self.going, non_blocking=True)
            here = _event(self.going)
            if step and not self._goes_on(step - 1, before):
                break
            before = here
        return self.ended.generated(int(self.passes), n_samples)

    def _goes_on(self, step: int, event: torch.cuda.Event | None) -> bool:
        """Whether a source was open behind a step that is known to be over, or is waited for."""
        if event is not None:
            event.synchronize()
        return bool(self.told[step % 2])

    def _begin(self) -> None:
        self.sources.read()
        self.cache.clear()
        for token in self.forced:
            tokens_BK = torch.full(self.score_BK.shape, token, device=self.step.device)
            self.cache.append(tokens_BK, self.sources.memory, self.sources.bias_B11S)
        self.passes.fill_(len(self.forced))
        self.history_BKL.fill_(self.start)
        self.step.fill_(1)
        self.score_BK.fill_(-torch.inf)
        self.score_BK[:, 0].fill_(0.0)
        self.open_B.copy_(self.sources.length_B > 0)
        self.ended.clear()

    def _advance(self) -> None:
        """Appends one token to every hypothesis."""
        options, last = self.options, self.step - 1
        self.passes += self.open_B.any()
        tokens_BK = self.history_BKL.index_select(2, last)[:, :, 0]
        h_BKD = self.cache.append(tokens_BK, self.sources.memory, self.sources.bias_B11S)
        score_BC, parent_BC, token_BC = self._continuations(self.model.logits(h_BKD.flatten(0, 1)))
        ends_BC = token_BC == self.model.ids.eos
        self._end(score_BC, parent_BC, ends_BC)
        kept_BK = first_open(ends_BC, options.beam)
        parent_BK = parent_BC.gather(1, kept_BK)
        self.score_BK.copy_(score_BC.masked_fill(ends_BC, -torch.inf).gather(1, kept_BK))
        self.open_B &= (self.ended.count_B < options.beam) & (self.score_BK > -torch.inf).any(dim=1)
        self.going.copy_(self.open_B.any())
        self.cache.reorder(parent_BK)
        self.history_BKL.copy_(self.history_BKL.gather(1, parent_BK[:, :, None].expand_as(self.history_BKL)))
        self.history_BKL.index_copy_(2, self.step, token_BC.gather(1, kept_BK)[:, :, None])
        self.step += 1

    def _continuations(self, logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The 2 `beam` best of each source, best first, as `beam._continuations`; EOS alone in the last step."""
        logits_NV = logits_NV.to(self.score_BK.dtype)
        total_N1 = logits_NV.logsumexp(dim=1, keepdim=True)
        banned_V = self.banned_V | (self.not_eos_V & (self.step >= self.steps))
        most = min(2 * self.options.beam, logits_NV.shape[1])
        value_NC, token_NC = logits_NV.masked_fill(banned_V, -torch.inf).topk(most, dim=1)
        sources = len(self.score_BK)
        all_BX = (self.score_BK.view(-1, 1) + value_NC - total_N1).view(sources, -1)
        score_BC, at_BC = all_BX.topk(min(2 * self.options.beam, all_BX.shape[1]), dim=1)
        return score_BC, at_BC // most, token_NC.view(sources, -1).gather(1, at_BC)

    def _end(self, score_BC: Tensor, parent_BC: Tensor, ends_BC: Tensor) -> None:
        """Takes in the continuations among the `beam` best that end, of open sources."""
        beam = self.options.beam
        score_BK, parent_BK = score_BC[:, :beam], parent_BC[:, :beam]
        ends_BK = ends_BC[:, :beam] & (score_BK > -torch.inf) & self.open_B[:, None]
        normal_BK = score_BK.double() / self.step.double() ** self.options.length_penalty
        text_BKL = self.history_BKL.gather(1, parent_BK[:, :, None].expand_as(self.history_BKL))
        self.ended.merge(normal_BK.masked_fill(~ends_BK, -torch.inf), text_BKL, self.step * ends_BK, ends_BK)


def _event(on: Tensor) -> torch.cuda.Event | None:
    """Recorded behind all that was launched; None on a CPU, where all is over."""
    if on.device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
