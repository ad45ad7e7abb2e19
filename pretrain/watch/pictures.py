"""Who reads whom, as a picture: the masks of one short sample, drawn from the batch that training would see.

A line of the picture is a row, a column a key; a coloured cell means that the row reads the key. Colours and names say
what a key is: content, visible, MASK or compensation. Rows of a query stream have no keys. To the right stands what a
row has to predict.

Shapes: R rows, K keys.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from parlance_kernels import SampleMask
from pretrain.models import SpecialIds
from pretrain.models.rows import DecoderRows, SourceRows

CELL, FONT, GAP, LETTERS = 16, 12, 10, 16
WHITE, GRID, INK = (255, 255, 255), (226, 228, 232), (40, 42, 46)
COLOURS = {
    "source": (120, 132, 150),
    "AR content": (66, 133, 190),
    "visible": (74, 160, 96),
    "MASK": (222, 160, 38),
    "compensation": (190, 82, 96),
}
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Axis:
    """The rows or keys of one mask. names: what each is; tokens: its text."""

    names: Sequence[str]
    tokens: Sequence[str]


def mask_pictures(batch: Any, ids: SpecialIds, decode: Decode) -> dict[str, np.ndarray]:
    """{"encoder", "decoder"}: uint8 [height, width, 3] of a packed batch (keep it to one short sample).

    The decoder's rows read its own keys (left) and the encoder's output (right).
    ids, decode: for the labels; decode makes text of token ids, of a special one none.
    """
    source: SourceRows = batch.source
    rows: DecoderRows = batch.rows

    special = {ids.mask: "[M]", ids.bos: "<s>", ids.eos: "</s>", ids.unk: "<unk>"}

    def tokens(ids_R: Any) -> list[str]:
        return [special.get(token) or " ".join(decode([token]).split())[:LETTERS] for token in ids_R.tolist()]

    memory = Axis(["source"] * source.mask.n_rows, tokens(source.tokens_R))
    names = _decoder_names(rows, ids.mask)
    decoder = Axis(names, tokens(rows.tokens_R))
    keys = Axis(names[: rows.n_keys], decoder.tokens[: rows.n_keys])
    predicted = dict(zip(rows.out_L.tolist(), tokens(batch.target_L), strict=True))
    return {
        "encoder": _draw(memory, [(memory, source.mask)], {}),
        "decoder": _draw(decoder, [(keys, rows.self_mask), (memory, rows.cross_mask)], predicted),
    }


def _decoder_names(rows: DecoderRows, mask_id: int) -> list[str]:
    """What each decoder row is, told from the shape of its segment (see `SampleMask`) and its token."""
    names = []
    for segment in rows.self_mask:
        for row in range(segment.row_start, segment.row_start + segment.rows):
            if row >= rows.n_keys:
                names.append("AUX query" if segment.window_len else "AR query")
            elif segment.prefix_step:
                names.append("AR content")
            elif segment.window_len:
                names.append("compensation")
            else:
                names.append("MASK" if int(rows.tokens_R[row]) == mask_id else "visible")
    return names


def _draw(rows: Axis, blocks: Sequence[tuple[Axis, SampleMask]], predicted: Mapping[int, str]) -> np.ndarray:
    """Blocks of columns side by side, names and tokens of the rows to the left, those of the keys on top.

    predicted: {row: token} for the right margin.
    """
    font = ImageFont.load_default(FONT)
    axes = [rows, *(keys for keys, _ in blocks)]
    longest = max((font.getlength(token) for axis in axes for token in axis.tokens), default=0)
    named = max((font.getlength(name) for axis in axes for name in axis.names), default=0)
    label = int(longest) + 2 * GAP
    left, top = int(named) + label + 2 * GAP, label + FONT + 2 * GAP
    starts = np.cumsum([left, *(CELL * len(keys.names) + 2 * GAP for keys, _ in blocks)]).tolist()
    right = label + 2 * GAP if predicted else 0
    image = Image.new("RGB", (starts[-1] + right, top + CELL * len(rows.names) + GAP), WHITE)
    draw = ImageDraw.Draw(image)
    for start, (keys, mask) in zip(starts, blocks, strict=False):
        _cells(draw, start, top, keys, mask)
        for index, token in enumerate(keys.tokens):
            _upright(image, token, font, start + CELL * index, top - GAP // 2)
        for first, length, name in _bands(keys.names):
            draw.rectangle((start + CELL * first, 0, start + CELL * (first + length) - 2, 4), _colour(name))
            if font.getlength(name) < CELL * length + GAP:
                draw.text((start + CELL * first, 7), name, INK, font)
    for index, token in enumerate(rows.tokens):
        draw.text((left - GAP // 2, top + CELL * index + CELL // 2), token, INK, font, anchor="rm")
    if predicted:
        draw.text((starts[-1] - GAP, 7), "predicts", INK, font)
    for index, token in predicted.items():
        draw.text((starts[-1] - GAP, top + CELL * index + CELL // 2), token, INK, font, anchor="lm")
    for first, length, name in _bands(rows.names):
        draw.rectangle((0, top + CELL * first, 4, top + CELL * (first + length) - 2), _colour(name))
        draw.text((GAP, top + CELL * first + CELL // 2), name, INK, font, anchor="lm")
    return np.asarray(image)


def _cells(draw: ImageDraw.ImageDraw, left: int, top: int, keys: Axis, mask: SampleMask) -> None:
    for row, line in enumerate(mask.materialise().tolist()):
        for key, reads in enumerate(line):
            x, y = left + CELL * key, top + CELL * row
            fill = _colour(keys.names[key]) if reads else WHITE
            draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill, None if reads else GRID)


def _upright(image: Image.Image, text: str, font: Any, x: int, bottom: int) -> None:
    """Writes `text` upwards, ending in a column that starts at x."""
    width = int(font.getlength(text)) + 2
    strip = Image.new("RGB", (width, CELL), WHITE)
    ImageDraw.Draw(strip).text((0, CELL // 2), text, INK, font, anchor="lm")
    image.paste(strip.rotate(90, expand=True), (x, bottom - width))


def _bands(names: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first, length, name) of each run of equal names."""
    bands, first = [], 0
    for name, run in groupby(names):
        length = len(list(run))
        bands.append((first, length, name))
        first += length
    return bands


def _colour(name: str) -> tuple[int, int, int]:
    return COLOURS.get(name, INK)
