"""LPLM by its definition, the judge of the packed one: every row through every layer, then `torch.where`.

Each copy is a pass of its own over padded batches, as the released code has it. Nothing is shared and nothing skipped.

Shapes: B samples, T rows, D width, V vocabulary, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.models import EncoderDecoder, reference
from pretrain.models.layers import DecoderLayer
from pretrain.objectives.base import LossSums
from pretrain.objectives.janus_reference import cross_entropy
from pretrain.objectives.lplm import ExitExample, Lplm


@dataclass(frozen=True)
class ReferenceCopy:
    """One copy of a batch; rows of padding hold undefined values.

    input_LBTD: what each layer reads, after copying. output_LBTD: what it computes, before.
    """

    exit_BT: Tensor
    input_LBTD: Tensor
    output_LBTD: Tensor
    state_BTD: Tensor
    logits_BTV: Tensor
    length_BN: Tensor


def forward(model: EncoderDecoder, examples: Sequence[ExitExample], objective: Lplm, copy: int) -> ReferenceCopy:
    """One pass in which row t of sample b leaves at `examples[b].exits[copy, t]`."""
    ids, options = model.ids, objective.options
    source_BS = reference.pad([torch.from_numpy(e.source) for e in examples], ids.pad)
    real_BS = reference.pad([torch.ones(len(e.source), dtype=torch.int64) for e in examples], 0).bool()
    memory_BSD = reference.encode(model, source_BS, torch.arange(source_BS.shape[1]).expand_as(source_BS), real_BS)

    lengths_B1 = torch.tensor([[len(e.target) - 1] for e in examples])
    places_BT = torch.arange(int(lengths_B1.max())).expand(len(examples), -1)
    exit_BT = torch.stack([torch.from_numpy(e.exits[copy])[places_BT[0] % e.exits.shape[1]] for e in examples])
    tokens_BT = torch.full_like(places_BT, ids.mask)
    if options.first_row == "bos":
        tokens_BT[:, 0] = ids.bos
    seen_BT = torch.ones_like(tokens_BT).bool() if options.rows == "longest" else places_BT < lengths_B1
    visible_BTT = seen_BT[:, None, :].expand(-1, places_BT.shape[1], -1)

    x_BTD = reference.embed(model, model.decoder, tokens_BT, places_BT)
    state_BTD = torch.zeros_like(x_BTD)
    inputs, outputs = [], []
    for number, layer in enumerate(model.decoder.layers, start=1):
        assert isinstance(layer, DecoderLayer)
        inputs.append(x_BTD)
        keys_BTD = layer.self_attn_layer_norm(x_BTD) if layer.pre_norm else x_BTD
        out_BTD = reference.decoder_layer(layer, x_BTD, keys_BTD, visible_BTT, memory_BSD, real_BS)
        outputs.append(out_BTD)
        state_BTD = torch.where((exit_BT == number)[:, :, None], out_BTD, state_BTD)
        copied_BTD = state_BTD.detach() if options.detach_copied_state else state_BTD
        x_BTD = torch.where((exit_BT <= number)[:, :, None], copied_BTD, out_BTD)
    return ReferenceCopy(
        exit_BT=exit_BT,
        input_LBTD=torch.stack(inputs),
        output_LBTD=torch.stack(outputs),
        state_BTD=state_BTD,
        logits_BTV=_logits(model, model.decoder.layer_norm(state_BTD), exit_BT),
        length_BN=reference.length_logits(model, memory_BSD, real_BS),
    )


def _logits(model: EncoderDecoder, h_BTD: Tensor, exit_BT: Tensor) -> Tensor:
    """Each row's logits by the off-ramp of the layer where it left."""
    if not model.ramps:
        return model.logits(h_BTD)
    every_LBTV = torch.stack([model.ramp(layer + 1)(h_BTD) for layer in range(len(model.decoder.layers))])
    return every_LBTV.gather(0, (exit_BT - 1)[None, :, :, None].expand(1, -1, -1, every_LBTV.shape[-1]))[0]


def losses(
    model: EncoderDecoder, examples: Sequence[ExitExample], objective: Lplm, scale: Mapping[str, float]
) -> tuple[Tensor, LossSums]:
    """(scaled total, sums per term), as `Lplm.losses` returns them."""
    targets = torch.cat([torch.from_numpy(e.target[1:]) for e in examples])
    lplm, length = torch.zeros(()), torch.zeros(())
    for copy in range(objective.options.copies):
        run = forward(model, examples, objective, copy)
        rows = torch.cat([run.logits_BTV[b, : len(e.target) - 1] for b, e in enumerate(examples)])
        lplm = lplm + cross_entropy(rows, targets, objective.options.label_smoothing)
        classes = torch.tensor([len(e.target) for e in examples]).clamp(max=run.length_BN.shape[1] - 1)
        length = F.cross_entropy(run.length_BN, classes, reduction="sum")
    sums = {"lplm": lplm, "length": length}
    total = sum((scale[name] * value for name, value in sums.items()), torch.zeros(()))
    return total, {name: value.detach() for name, value in sums.items()}
