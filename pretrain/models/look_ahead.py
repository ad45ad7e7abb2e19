"""AR verification of given tokens and NAR drafts of what follows each of them, in one decoder pass.

A text's past is kept as keys and values of causal content rows, as in `incremental.py`. A pass feeds T tokens to each
text. For token i it computes three kinds of rows, at the positions that AR and NAR have in training:

    content         reads the past and the fed tokens 0..i; kept
    AR query        rank 0: reads the same and predicts token i + 1, exactly as one-by-one decoding does
    window          MASKs of ranks 1..N: each reads the same, the AR query and its whole window, and predicts token
                    i + 1 + rank, as a NAR row does with everything behind token i hidden

The AR query is the first MASK of its window, so that N + 1 tokens are hidden without a gap. Two things differ from NAR
in training: the visible tokens do not look at MASKs, nor at later tokens, which is what lets them be kept; and the EOS
is not among them, because nobody knows where it is. On trained weights neither mattered: at rank 1 28 % are what greedy
AR writes, at rank 2 19 %; 28 and 20 % with the pattern of training, 29 and 21 % if the true length is told besides (a
JANUS of 9.7 M parameters after 5,420 updates, 24 texts). MASKs that do not read their window are right in 14 and 6 %.

Shapes: S sources, A texts that still grow, T fed tokens, N ranks of a window behind the AR query, K = N + 1, R rows,
H heads, E head width, D width, Z cells of the cache or kinds of rows.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from parlance_kernels import SampleMask
from pretrain.models.encoder_decoder import EncoderDecoder
from pretrain.models.incremental import project_memory
from pretrain.models.layers import DecoderLayer
from pretrain.models.patterns import ArLayout
from pretrain.models.rows import SourceRows


class LookAhead:
    """Decoding state of one text a source; texts may differ in length. The model must be in eval mode.

    length_S: int64 on the host, content rows kept of each text.

    Args:
        source: the encoder's input; encoded here.
        layout: where the AR pattern starts and which position its query rows carry.
        longest: most tokens that `keep` will ever keep of a text; what is fed behind them means nothing.
        fed: most tokens of a pass. ahead: N, ranks of a window; at least 1.
    """

    def __init__(
        self, model: EncoderDecoder, source: SourceRows, layout: ArLayout, longest: int, fed: int, ahead: int
    ) -> None:
        self.model, self.layout, self.ahead = model, layout, ahead
        self.memory = project_memory(model, model.encode(source))
        self.ranges_S2 = [source.memory_range(index) for index in range(source.n_samples)]
        self.n_memory = source.mask.n_rows
        self.length_S = np.zeros(source.n_samples, np.int64)
        self.width = longest + fed * (2 + ahead)
        like, heads = model.shared.weight, model.config.heads
        shape = source.n_samples, self.width, heads, model.config.d_model // heads
        self.cache = [(like.new_empty(shape), like.new_empty(shape)) for _ in model.decoder.layers]

    def step(self, texts_A: np.ndarray, tokens_AT: Tensor) -> Tensor:
        """Feeds tokens to some texts: h_ATKD, what the head reads to predict token i + 1 + rank from row i.

        texts_A: int64, increasing indices of sources. Nothing counts as fed until `keep` says how much of it does.
        """
        (texts, fed), kinds = tokens_AT.shape, 2 + self.ahead
        device, first_A = tokens_AT.device, self.length_S[texts_A]
        x_RD = self._embed(tokens_AT, torch.from_numpy(first_A).to(device))
        cell_AZ = first_A[:, None] + np.arange(fed * kinds)
        cell_Z = torch.from_numpy((texts_A[:, None] * self.width + cell_AZ).ravel()).to(device)
        masks = self._self_mask(texts_A, fed, kinds), self._cross_mask(texts_A, fed * kinds)
        layers = cast(Sequence[DecoderLayer], self.model.decoder.layers)
        for layer, buffers, memory in zip(layers, self.cache, self.memory, strict=True):
            y_RD = layer.self_attn_layer_norm(x_RD) if layer.pre_norm else x_RD
            keys = buffers[0].flatten(0, 1), buffers[1].flatten(0, 1)
            for buffer_ZHE, new_RHE in zip(keys, layer.self_attn.keys_values(y_RD), strict=True):
                buffer_ZHE[cell_Z] = _content_then_windows(new_RHE, texts, fed)
            if layer is layers[-1]:
                x_RD, y_RD = (z.view(texts, kinds, fed, -1)[:, 1:].flatten(0, 2) for z in (x_RD, y_RD))
                masks = self._self_mask(texts_A, fed, kinds - 1), self._cross_mask(texts_A, fed * (kinds - 1))
            x_RD = layer.rows(x_RD, y_RD, keys, memory, *masks)
        return self.model.decoder.layer_norm(x_RD).view(texts, kinds - 1, fed, -1).transpose(1, 2)

    def keep(self, texts_A: np.ndarray, counts_A: np.ndarray) -> None:
        """Of what the last pass fed to `texts_A`, the first `counts_A` tokens stay; the next writes over the others."""
        self.length_S[texts_A] += counts_A

    def _embed(self, tokens_AT: Tensor, first_A: Tensor) -> Tensor:
        """Input of the first layer: of each text its content rows, its AR queries, and its windows rank by rank."""
        model, layout = self.model, self.layout
        texts, fed = tokens_AT.shape
        place_AT = first_A[:, None] + torch.arange(fed, device=first_A.device)
        ahead = [layout.shift + rank for rank in range(1, self.ahead + 1)]
        offset_Z = torch.tensor([0, layout.query_position_offset, *ahead], device=first_A.device)
        # Beyond the last position there is no text, so it does not matter what these rows are taken for.
        position_AZT = (place_AT[:, None] + offset_Z[:, None]).clamp(max=model.config.max_positions - 1)
        mask_AKT = tokens_AT.new_full((texts, 1 + self.ahead, fed), layout.ids.mask)
        token_R = torch.cat([tokens_AT[:, None], mask_AKT], dim=1).flatten()
        return model.decoder.embed(model.shared(token_R) * model.scale, position_AZT.flatten())

    def _self_mask(self, texts_A: np.ndarray, fed: int, kinds: int) -> SampleMask:
        """Row i of every kind reads the past and the fed tokens 0..i, a window row also the i-th window behind them."""
        window = 1 + self.ahead
        table: list[tuple[int, ...]] = []
        for text, past in zip(texts_A.tolist(), self.length_S[texts_A].tolist(), strict=True):
            own = (past + fed, window, window)
            for kind in range(kinds):
                reads = own if kind >= kinds - self.ahead else (0, 0, 0)
                table.append((len(table) * fed, fed, text * self.width, past + 1, 1, *reads))
        return SampleMask.build(table, len(self.length_S) * self.width)

    def _cross_mask(self, texts_A: np.ndarray, rows: int) -> SampleMask:
        table = [(n * rows, rows, *self.ranges_S2[text], 0, 0, 0, 0) for n, text in enumerate(texts_A.tolist())]
        return SampleMask.build(table, self.n_memory)


def _content_then_windows(new_RHE: Tensor, texts: int, fed: int) -> Tensor:
    """Rows of a pass as they lie in the cache: the content of a text, then window by window (query, ranks)."""
    new_AZTHE = new_RHE.unflatten(0, (texts, -1, fed))
    windows = new_AZTHE[:, 1:].transpose(1, 2).flatten(1, 2)
    return torch.cat([new_AZTHE[:, 0], windows], dim=1).flatten(0, 1)
