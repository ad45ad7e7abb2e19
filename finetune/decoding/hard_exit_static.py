"""Hard exit in fixed shapes, for CUDA graphs: the texts of `hard_exit`, which says what is computed.

A graph for each run of layers up to one whose off-ramp is asked. The host then reads one number, how many rows are
left, and starts no other graph where none is. What a few short texts cost a GPU is the start of its work, so layers
that nobody reaches are worth more than rows: those that have left are computed with the others, and kept as they were.

Shapes: B sources, S tokens of the longest, T rows of a text, L rows of all texts, D width.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from finetune.decoding.common import Generated, until_eos
from finetune.decoding.graphs import Graphed, PaddedSources, Shapes, filled
from finetune.decoding.hard_exit import HardExitDecoding, exits_of, row_counts, settled
from pretrain.models import EncoderDecoder, SourceRows, static
from pretrain.models.early_exit import ExitRule, ParallelRows, off_ramp, whole_layer
from pretrain.models.encoder_decoder import writing
from pretrain.models.patterns import FirstRow, mask_rows


class StaticHardExit:
    """`hard_exit` of one model with these options; keeps graphs of each shape it meets."""

    def __init__(self, model: EncoderDecoder, first_row: FirstRow, options: HardExitDecoding) -> None:
        longest, rule = settled(model, options)
        self.model, self.first_row, self.options, self.longest = model, first_row, options, longest
        inputs = mask_rows(longest - 1, model.ids, first_row).tolist()
        self.shapes = Shapes(partial(_Pass, model, inputs, rule), partial(PaddedSources.size, model))

    def __call__(self, source: SourceRows) -> Generated:
        """As `hard_exit`; operations are counted as they were done, those of rows that had left too."""
        if not source.n_samples:
            return Generated([], [], 0)
        count = source.n_samples
        with writing(self.model):
            made = filled(self.shapes, source)
            made.read()
            lengths = row_counts(self.options, self.longest, count, lambda: made.lengths_BN[:count])
            layers, asked = made.write(lengths)
        written = [x_BT.cpu() for x_BT in (made.token_BT, made.score_BT, made.exit_BT)]
        token_BT, score_BT, exit_BT = ([x_T[:n] for x_T, n in zip(x_BT, lengths, strict=False)] for x_BT in written)
        texts = until_eos(token_BT, score_BT, self.model.ids.eos, passes=1)
        exits = [exit_T[: len(tokens) + 1].numpy() for exit_T, tokens in zip(exit_BT, texts.tokens, strict=True)]
        work = [whole_layer(ParallelRows.pack(self.model, lengths, source, self.first_row))] * layers
        exits_of_all = exits_of(self.model.config, np.concatenate(exits), work, asked * sum(lengths))
        return replace(texts, exits=exits_of_all)


class _Pass:
    """Buffers for one shape, and the graphs of a pass.

    inputs: what a text's rows are before anything is known. rows_B: how many of them each text has. stays_BT: which
    rows have not left; remaining: int64 [], their number.
    """

    def __init__(self, model: EncoderDecoder, inputs: list[int], rule: ExitRule, sources: int, width: int) -> None:
        like, rows = model.shared.weight, len(inputs)
        columns, device = -(-rows // 8) * 8, like.device  # as fused attention wants its masks
        self.model, self.rule, self.rows = model, rule, rows
        self.certain = rule.certain(model.config)
        self.sources = PaddedSources(model, sources, width)
        self.lengths_BN = like.new_zeros(sources, model.config.length_classes)
        self.inputs_BT = torch.tensor([inputs + [model.ids.pad] * (columns - rows)], device=device).repeat(sources, 1)
        self.rows_B = torch.zeros(sources, dtype=torch.int64, device=device)
        self.x_BTD = like.new_zeros(sources, columns, model.config.d_model)
        self.bias_B11T = like.new_zeros(sources, 1, 1, columns)
        self.stays_BT = torch.zeros(sources, rows, dtype=torch.bool, device=device)
        self.remaining = torch.zeros((), dtype=torch.int64, device=device)
        self.token_BT, self.exit_BT = (torch.zeros_like(self.stays_BT, dtype=torch.int64) for _ in range(2))
        self.score_BT = torch.zeros_like(self.stays_BT, dtype=torch.promote_types(like.dtype, torch.float32))
        self.read, self.begin = Graphed(self._read, device), Graphed(self._begin, device)
        last = model.config.decoder_layers
        ends = [number for number in range(1, last) if rule.asks(number)] + [last]
        self.runs = [
            (end, Graphed(partial(self._run, first, end), device))
            for first, end in zip([1, *(end + 1 for end in ends)], ends, strict=False)
        ]

    def write(self, lengths: Sequence[int]) -> tuple[int, int]:
        """Fills token_BT, score_BT, exit_BT for texts of so many rows; how many layers ran and off-ramps were asked."""
        self.rows_B.copy_(torch.tensor([*lengths, *[0] * (len(self.rows_B) - len(lengths))]))
        self.begin()
        end = asked = 0
        for end, run in self.runs:
            run()
            asked += 1
            if end < len(self.sources.memory) and not int(self.remaining):
                break
        return end, asked

    def _read(self) -> None:
        memory_BSD, inside_BS = self.sources.read()
        self.lengths_BN.copy_(static.length_logits(self.model, memory_BSD, inside_BS))

    def _begin(self) -> None:
        inside_BT = static.inside(self.rows_B, self.inputs_BT.shape[1])
        self.stays_BT.copy_(inside_BT[:, : self.rows])
        # Padding reads one row, because what reads nothing is no number.
        seen_BT = static.inside(self.rows_B.clamp(min=1), self.inputs_BT.shape[1])
        self.bias_B11T.copy_(static.bias(seen_BT[:, None, None], self.bias_B11T.dtype))
        self.x_BTD.copy_(static.embed(self.model, self.model.decoder, self.inputs_BT, inside_BT))

    def _run(self, first: int, end: int) -> None:
        """Layers `first` to `end`, for the rows that stay, and the off-ramp of `end`."""
        model = self.model
        for number in range(first, end + 1):
            layer, memory = static.layers_of(model)[number - 1], self.sources.memory[number - 1]
            y_BTD = layer.self_attn_layer_norm(self.x_BTD) if layer.pre_norm else self.x_BTD
            keys = layer.self_attn.keys_values(y_BTD)
            out_BTD = layer.rows(self.x_BTD, y_BTD, keys, memory, self.bias_B11T, self.sources.bias_B11S)
            x_BTD = self.x_BTD[:, : self.rows]
            x_BTD.copy_(torch.where(self.stays_BT[:, :, None], out_BTD[:, : self.rows], x_BTD))
        self._leave(end)

    def _leave(self, number: int) -> None:
        model = self.model
        h_BTD = model.decoder.layer_norm(self.x_BTD[:, : self.rows])
        ramp = off_ramp(model.ramp(number), h_BTD.flatten(0, 1), model.ids.never_written)
        leaves_BT = self.stays_BT
        if not self.certain and number < model.config.decoder_layers:
            leaves_BT = leaves_BT & (ramp.entropy_L < self.rule.threshold).view_as(leaves_BT)
        for buffer, made_L in ((self.token_BT, ramp.token_L), (self.score_BT, ramp.log_p_L)):
            buffer.copy_(torch.where(leaves_BT, made_L.view_as(buffer).to(buffer.dtype), buffer))
        self.exit_BT.masked_fill_(leaves_BT, number)
        self.stays_BT.copy_(self.stays_BT & ~leaves_BT)
        self.remaining.copy_(self.stays_BT.sum())
