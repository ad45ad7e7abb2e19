"""Sampling from left to right: each token is drawn from what the model expects next.

A draw is a race: the token of smallest exponential / probability wins, which has exactly these odds. The numbers of a
text follow from the seed, the number of its source and its own, so that it can be drawn again alone, and rounding that
differs with the batch decides only where two tokens are that close.

Shapes: N texts being written, T tokens of each so far, V vocabulary, C tokens that may be drawn.
"""

import numpy as np
import torch
from torch import Tensor

from finetune.decoding.common import Generated, check_length
from finetune.decoding.left_to_right import ArDecoding, never_written, score_dtype
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.models.encoder_decoder import writing
from pretrain.models.incremental import IncrementalDecoder, StreamName
from pretrain.models.patterns import ArLayout

SMALLEST = 1e-300  # an exponential may be rounded to 0, and nothing may be divided by it


def sample(
    model: EncoderDecoder, source: SourceRows, layout: ArLayout, stream: StreamName, options: ArDecoding
) -> Generated:
    """`options.n_best` texts a source, in the order in which they were drawn; streams and layouts as in `beam_search`.

    Score: as of a beam, sum of log-probabilities / length ** length_penalty by the model itself, without temperature
    and top-k. At `max_length` EOS is forced.

    Raises:
        ConfigError: if `max_length` exceeds the model's positions.
    """
    check_length(model, options.max_length)
    each, device = options.n_best, model.shared.weight.device
    if not source.n_samples:
        return Generated([], [], 0, n_best=each)
    numbers = range(source.n_samples) if source.number_B is None else source.number_B.tolist()
    draws = [_generator(options.seed, number, copy) for number in numbers for copy in range(each)]
    texts, scores = [np.empty(0, np.int64)] * len(draws), [0.0] * len(draws)
    with writing(model):
        state = IncrementalDecoder(model, source, layout, stream, options.max_length, len(draws))
        *forced, first = layout.start
        for token in forced:
            state.step(torch.full((source.n_samples,), token, device=device))
        state.reorder(torch.arange(source.n_samples, device=device).repeat_interleave(each))
        open_N = np.arange(len(draws))
        history_NT = torch.full((len(draws), 1), first, device=device)
        score_N = torch.zeros(len(draws), device=device, dtype=score_dtype(model))
        for step in range(1, options.max_length):
            logits_NV = state.step(history_NT[:, -1]).to(score_N.dtype)
            total_N = logits_NV.logsumexp(dim=1)
            if step < options.max_length - 1:
                never_written(logits_NV, history_NT, model.ids, options)
                token_N = _drawn(logits_NV, [draws[n] for n in open_N], options)
            else:
                token_N = torch.full_like(history_NT[:, 0], model.ids.eos)
            score_N += logits_NV.gather(1, token_N[:, None])[:, 0] - total_N
            ends_N = token_N == model.ids.eos
            ended = ends_N.cpu().numpy()
            finished = history_NT[ends_N].cpu().numpy(), score_N[ends_N].tolist()
            for n, text, score in zip(open_N[ended], *finished, strict=True):
                texts[n], scores[n] = text[1:].copy(), score / step**options.length_penalty
            kept_N = (~ends_N).nonzero()[:, 0]
            if not len(kept_N):
                break
            open_N, score_N = open_N[~ended], score_N[kept_N]
            history_NT = torch.cat([history_NT, token_N[:, None]], dim=1)[kept_N]
            state.reorder(kept_N)
        return Generated(texts, scores, state.length, n_best=each)


def _generator(seed: int, number: int, copy: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number, copy))))


def _drawn(logits_NV: Tensor, draws: list[np.random.Generator], options: ArDecoding) -> Tensor:
    """token_N."""
    choice_NC = None
    if options.top_k:
        logits_NV, choice_NC = logits_NV.topk(min(options.top_k, logits_NV.shape[1]), dim=1)
    logits_NC = logits_NV.double()
    # The largest first becomes 0, so that no temperature makes it infinite.
    p_NC = ((logits_NC - logits_NC.amax(dim=1, keepdim=True)) / options.temperature).softmax(dim=1)
    race = np.stack([draw.standard_exponential(p_NC.shape[1]) for draw in draws])
    at_N = (p_NC / torch.from_numpy(race).to(p_NC.device).clamp_min(SMALLEST)).argmax(dim=1)
    return at_N if choice_NC is None else choice_NC.gather(1, at_N[:, None])[:, 0]
