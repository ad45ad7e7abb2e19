"""Soft exit: after every layer but the last, what a row would write is fed back into it (ELMER, section 4.3).

    y = argmax(head(h))        h <- W [h ; embedding(y)]        one W for all layers

The argmax carries no gradient; state and embedding do. In training some rows are fed the right token instead.

Shapes: R rows, D width, L layers, B boundaries between layers (L - 1).
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from pretrain.models.encoder_decoder import EncoderDecoder, VocabHead
from pretrain.models.layers import DecoderLayer
from pretrain.models.rows import DecoderRows


def decode_soft(
    model: EncoderDecoder,
    rows: DecoderRows,
    memory_MD: Tensor,
    target_R: Tensor | None = None,
    given_BR: Tensor | None = None,
) -> list[Tensor]:
    """h_RD after each of the L layers, ready for the head; `rows` must use every row.

    target_R, given_BR: the right token of each row, and whether it is fed in place of the argmax at each boundary.

    Raises:
        ValueError: the model has no feedback projection.
    """
    if not model.config.soft_exit:
        raise ValueError("soft exit needs a model with `soft_exit`, this one has no feedback projection")
    layers = cast(Sequence[DecoderLayer], model.decoder.layers)
    x_RD = model.decoder.embed(model.shared(rows.tokens_R) * model.scale, rows.positions_R)
    states: list[Tensor] = []
    for number, layer in enumerate(layers):
        masks = rows.self_mask, rows.cross_mask
        x_RD = model.run_layer(layer, x_RD, rows.n_keys, None, memory_MD, *masks)
        states.append(model.decoder.layer_norm(x_RD))
        if number + 1 == len(layers):
            break
        token_R = likeliest(model.ramp(number + 1), states[-1])
        if target_R is not None and given_BR is not None:
            token_R = torch.where(given_BR[number], target_R, token_R)
        x_RD = model.feedback(x_RD, embed_tokens(model, token_R))
    return states


@torch.no_grad()
def likeliest(head: VocabHead, h_RD: Tensor) -> Tensor:
    """int64 [R]: the token that each row would write; logits exist in blocks alone."""

    def best(logits_LV: Tensor) -> tuple[Tensor]:
        if head.part is None:
            return (logits_LV.argmax(dim=1),)
        return (head.part.best(*logits_LV.max(dim=1))[1],)

    (token_R,) = head(h_RD.detach(), reduction=best)
    return token_R


def embed_tokens(model: EncoderDecoder, token_R: Tensor) -> Tensor:
    """Embeddings without positions. Padding, which rows behind a text are given as the right token, is not trained."""
    e_RD = model.shared(token_R) * model.scale
    return torch.where((token_R == model.ids.pad)[:, None], e_RD.detach(), e_RD)
