"""Soft exit in fixed shapes, for CUDA graphs: the texts of `soft_exit`, from one graph.

The feedback W [h ; E(y)] is W_h h + W_e E(y), and W_e E(y) is looked up: no rows are laid side by side, and half of the
product is done once for every model.

Shapes: B sources, S tokens of the longest, T rows of a text, D width, V vocabulary.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.decoding.common import USUAL_LENGTH, Generated, check_length, most_likely, until_eos
from finetune.decoding.graphs import Graphed, PaddedSources, Shapes, filled
from finetune.decoding.soft_exit import SoftExitDecoding
from pretrain.models import EncoderDecoder, SourceRows, static
from pretrain.models.encoder_decoder import writing
from pretrain.models.patterns import FirstRow, mask_rows
from pretrain.models.soft_exit import likeliest


class StaticSoftExit:
    """`soft_exit` of one model, with its weights as they are now; keeps a graph of each shape it meets."""

    def __init__(self, model: EncoderDecoder, first_row: FirstRow, options: SoftExitDecoding) -> None:
        longest = options.max_length or USUAL_LENGTH
        check_length(model, longest)
        self.model, self.rows = model, longest - 1
        with torch.no_grad():
            fed_VD = F.linear(model.shared.weight * model.scale, model.feedback.weight[:, model.config.d_model :])
        made = partial(_Pass, model, mask_rows(self.rows, model.ids, first_row).tolist(), fed_VD)
        self.shapes = Shapes(made, partial(PaddedSources.size, model))

    def __call__(self, source: SourceRows) -> Generated:
        """As `soft_exit`."""
        if not source.n_samples:
            return Generated([], [], 0)
        with writing(self.model):
            made = filled(self.shapes, source)
            made.write()
        token_BT, score_BT = made.token_BT[: source.n_samples].cpu(), made.score_BT[: source.n_samples].cpu()
        return until_eos(list(token_BT), list(score_BT), self.model.ids.eos, passes=1)


class _Pass:
    """Buffers for one shape, and the graph that reads and writes.

    inputs: what a text's rows are before anything is known. fed_VD: what a layer is fed for each token.
    """

    def __init__(self, model: EncoderDecoder, inputs: list[int], fed_VD: Tensor, sources: int, width: int) -> None:
        device, rows = fed_VD.device, len(inputs)
        columns = -(-rows // 8) * 8  # as fused attention wants its masks
        self.model, self.fed_VD, self.rows = model, fed_VD, rows
        self.sources = PaddedSources(model, sources, width)
        padding = [model.ids.pad] * (columns - rows)
        self.inputs_BT = torch.tensor([inputs + padding], device=device).repeat(sources, 1)
        self.inside_BT = (torch.arange(columns, device=device) < rows).repeat(sources, 1)
        self.banned_X = torch.tensor(model.ids.never_written, device=device)
        self.token_BT = torch.zeros(sources, rows, dtype=torch.int64, device=device)
        wide = torch.promote_types(fed_VD.dtype, torch.float32)
        self.score_BT = torch.zeros(sources, rows, dtype=wide, device=device)
        self.write = Graphed(self._write, device)

    def _write(self) -> None:
        model = self.model
        self.sources.read()
        x_BTD = static.embed(model, model.decoder, self.inputs_BT, self.inside_BT)
        bias_B11T = static.bias(self.inside_BT[:, None, None], x_BTD.dtype)
        layers = static.layers_of(model)
        for number, (layer, memory) in enumerate(zip(layers, self.sources.memory, strict=True), start=1):
            y_BTD = layer.self_attn_layer_norm(x_BTD) if layer.pre_norm else x_BTD
            keys = layer.self_attn.keys_values(y_BTD)
            x_BTD = layer.rows(x_BTD, y_BTD, keys, memory, bias_B11T, self.sources.bias_B11S)
            if number < len(layers):
                x_BTD = self._fed(x_BTD, number)
        h_BTD = model.decoder.layer_norm(x_BTD)[:, : self.rows]
        token_L, score_L = most_likely(model, h_BTD.flatten(0, 1), self.banned_X)
        self.token_BT.copy_(token_L.view_as(self.token_BT))
        self.score_BT.copy_(score_L.view_as(self.score_BT))

    def _fed(self, x_BTD: Tensor, number: int) -> Tensor:
        """The input of the layer above, from the output of layer `number` and the token that it would write."""
        model = self.model
        h_LD = model.decoder.layer_norm(x_BTD).flatten(0, 1)
        fed_BTD = F.embedding(likeliest(model.ramp(number), h_LD), self.fed_VD).view_as(x_BTD)
        return F.linear(x_BTD, model.feedback.weight[:, : model.config.d_model]) + fed_BTD
