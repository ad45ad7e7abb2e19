"""Bytes: what one rank holds in memory while it trains, and what a checkpoint weighs on disk.

Weights, gradients, masters and moments follow from the engine's configuration. Its buffers and the activations are
estimates of what torch's operators keep (tests compare both with what really is allocated):

    activations = floats that autograd saves a row x rows + copies of keys and values + the scores of attention dropout
    a row of an encoder layer saves 9 D + 2 F floats, of a decoder layer 12 D + 2 F, dropout one D for each use

Of ranks that share a model each holds its part of most weights; of a row it saves 4 D whole in the encoder, 6 D in the
decoder, and its part of what lies inside attention and feed-forward.

Shapes: R rows, L rows with a use, D width, F feed-forward width, V vocabulary.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from parlance_kernels import SampleMask, resolve
from parlance_kernels.vocab_loss import chunked
from parlance_kernels.vocab_loss import cuda as kernel
from pretrain.config import EngineConfig, ModelConfig
from pretrain.engine.base import deal
from pretrain.engine.deepspeed import BUCKET
from pretrain.engine.state import KEYS
from pretrain.models.rows import LayerWork
from pretrain.objectives.batch import TokenBatch
from pretrain.rng import WORDS

FULL = 4  # bytes of a float32
# deepspeed keeps at most so many weights of ZeRO-3 gathered
GATHERED = 1_000_000_000
# float32 [chunk, V] tensors that live at once in the vocabulary loss of PyTorch; the kernel works in the logits
CHUNK_TENSORS = 4
# bytes around the generators of a rank: headers, lines of the manifest
RANK_FILES = 1024
# Parameters that ranks share evenly, and by rows of the vocabulary, of which the last ones may stand for nothing.
CUT = {
    "even": re.compile(r"\.(q_proj|k_proj|v_proj|fc1)\.|\.(out_proj|fc2)\.weight$"),
    "rows": re.compile(r"(^|\.)(shared|ramps\.\d+)\.weight$"),
}
# [heads, rows, keys] tensors that attention with dropout saves where no fused kernel does it: on a CPU
DROPPED_SCORES = 3


@dataclass(frozen=True)
class Memory:
    """{kind: bytes} of one rank, on its device and in the memory of its host, which may be the same.

    The host's are those of this rank alone: a machine holds as much for each of its ranks. building: bytes of the whole
    model, which every rank builds in the memory of the host before the rest is there.
    """

    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)
    building: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())

    @property
    def training(self) -> int:
        """Bytes in the memory of the host while the rank trains, where the device is another one."""
        return sum(self.host.values())

    @property
    def in_host(self) -> int:
        """The most bytes in the memory of the host, where the device is another one."""
        return max(self.training, self.building)

    @property
    def everywhere(self) -> int:
        """The most bytes in the memory of the host, where the device is the host."""
        return max(self.total + self.training, self.building)


def rank_memory(
    model: nn.Module,
    config: ModelConfig,
    engine: EngineConfig,
    ranks: int,
    device: str,
    activations: int,
    inherited: bool = False,
) -> Memory:
    """The memory of one of `ranks` ranks at the worst moment of an update: when a micro-batch but the first has been
    through the forward, or when gradients are reduced.

    model: for the shapes of its parameters, may be on `meta`. device: `cpu` or `cuda`.
    activations: bytes, from `activation_bytes`. inherited: the weights are those of a bundle.
    """
    degree = engine.tensor_parallel
    host = {"copy for checkpoints": copied_bytes(model, ranks, pinned=device == "cuda")}
    ranks //= degree
    sizes = part_sizes(model, degree)
    count, half = sum(sizes), engine.precision != "fp32"
    low = 2 if half else FULL
    local = engine.kind == "local"
    stage = 0 if local else engine.zero_stage
    share = -(-count // ranks)
    bucket = FULL * max(min(count, BUCKET), max(sizes))
    masters = FULL * (count if local else share) if half or stage else 0
    moments = 2 * FULL * (share if stage else count)
    # What a deepspeed of each stage keeps, and what it allocates besides when gradients are reduced; measured, see the
    # tests. By then the activations are gone.
    many = ranks > 1 and not local
    kept, reducing = ((0, FULL * count * many), (0, 2 * bucket), (0, 2 * bucket), (bucket, 2 * bucket))[stage]
    if stage == 0:
        gradients = (FULL + low * half) * count
    elif stage == 1:
        gradients = (FULL + low) * count if half else FULL * (count + share)
        reducing = 2 * FULL * count * many if half else reducing
    else:
        gradients = FULL * share
    weights = low * (share + min(count, GATHERED)) if stage == 3 else low * count

    with_kernel = device == "cuda" and degree == 1 and resolve(engine.backend) == "cuda"
    vocabulary = loss_bytes(config, low, with_kernel, degree)
    buffers = kept + max(0, reducing - activations - vocabulary)
    parts = {"weights": weights, "gradients": gradients, "masters": masters, "optimizer": moments, "buffers": buffers}
    if engine.offload != "none":
        host |= {"masters": parts.pop("masters"), "optimizer": parts.pop("optimizer"), "gradients": FULL * share}
        if stage < 3:  # beside the sums that the optimizer reads, those of the micro-batches; room to move the largest
            host["gradients"] += FULL * (share + max(sizes))
            parts["buffers"] += FULL * max(sizes)
        else:  # both sums lie there
            host["gradients"] += parts.pop("gradients")
    if engine.offload == "all":
        host["weights"] = low * share
        parts["weights"] -= low * share
    whole = FULL * sum(parameter.numel() for parameter in model.parameters()) * (2 if inherited else 1)
    building = whole if local else whole + FULL * share * half
    return Memory({**parts, "activations": activations, "vocabulary loss": vocabulary}, host, building)


def loss_bytes(config: ModelConfig, low: int, with_kernel: bool, degree: int = 1) -> int:
    """Bytes of the vocabulary loss: logits of a full chunk, and the float32 gradient of each head until the backward.

    low: bytes of a weight. degree: ranks that share the vocabulary. with_kernel: its chunks are larger, with logits of
    `low` bytes and gradients in their place; a vocabulary that products cannot read 16 bytes at a time is padded, and
    so is a copy of the weight.
    """
    vocabulary, width = -(-(config.vocab_size or 0) // degree), config.d_model
    heads = config.decoder_layers if config.off_ramps == "separate" else 1
    if not with_kernel:
        return FULL * vocabulary * (heads * width + CHUNK_TENSORS * chunked.CHUNK_ROWS)
    padded = vocabulary + kernel.padding(vocabulary)
    copied = low * padded * width if padded > vocabulary else 0
    return padded * (FULL * heads * width + low * kernel.CHUNK_ROWS) + copied


def part_sizes(model: nn.Module, degree: int) -> list[int]:
    """Numbers that a rank has of each parameter where `degree` ranks share the model, as `models.tensor_parallel`
    cuts it; `model` may be on `meta`."""
    sizes = []
    for name, parameter in model.named_parameters():
        rows, kind = len(parameter), next((kind for kind, names in CUT.items() if names.search(name)), None)
        each = parameter.numel() // degree if kind == "even" else parameter.numel() // rows * -(-rows // degree)
        sizes.append(each if kind else parameter.numel())
    return sizes


def activation_bytes(
    config: ModelConfig, batch: TokenBatch, precision: str, device: str, checkpointing: bool = False, degree: int = 1
) -> int:
    """Bytes that autograd saves for the backward of one micro-batch, without the vocabulary loss.

    checkpointing: only the inputs of the layers are kept, and the insides of one layer at a time. degree: ranks that
    share the model.
    """
    width, low = config.d_model, FULL if precision == "fp32" else 2
    source, rows = batch.source, batch.rows
    n_source, n_rows, dropped = source.mask.n_rows, len(rows.tokens_R), float(config.dropout > 0)
    if device != "cpu":
        dropped /= low  # a GPU keeps a byte for each number, a CPU the factor itself

    def scores(*masks: SampleMask) -> float:
        on = config.attention_dropout > 0 and device == "cpu"
        return DROPPED_SCORES * config.heads / degree * sum(_extent(mask) for mask in masks) if on else 0.0

    def decoder_layer(work: LayerWork) -> float:
        floats = work.rows * (6 * width + (6 * width + 2 * config.ffn_dim) / degree + 3 * width * dropped)
        masks = work.self_mask, work.cross_mask
        if work.gathered:  # the table of states, and a key and value for each that is read
            floats += width * (work.keys + 2 / degree * max(0, work.self_mask.n_keys - work.rows))
        return floats + 2 * width / degree * sum(map(_copied, masks)) + scores(*masks)

    inside = 5 * width + 2 * config.ffn_dim
    encoder = n_source * (4 * width + inside / degree + 2 * width * dropped) + scores(source.mask)
    decoder = [decoder_layer(work) for work in rows.work(config.decoder_layers)]
    kept = (n_source + n_rows) * width * (1 + dropped) + (n_source + n_rows) * width
    kept += 3 * width * batch.fed_rows
    if checkpointing:
        inputs = config.encoder_layers * n_source + config.decoder_layers * n_rows
        floats = kept + inputs * width + max(encoder, *decoder)
    else:
        floats = kept + config.encoder_layers * encoder + sum(decoder)
    return int(low * floats)


def checkpoint_bytes(model: nn.Module, ranks: int) -> int:
    """Size of the files of one commit, within a percent; `model` may be on `meta`."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors = sum(len(KEYS) * FULL * math.prod(shape) for shape in shapes.values())
    offsets = [tensors // 2, tensors // 2]  # as many digits as most have
    table = {
        f"{key}/{name}": {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        for name, shape in shapes.items()
        for key in KEYS
    }
    generators = torch.get_rng_state().numel() + 8 * (2 * WORDS + 1)
    written = len(json.dumps(table, separators=(",", ":"))) + len(json.dumps(shapes, indent=1))
    return tensors + written + ranks * (generators + RANK_FILES)


def copied_bytes(model: nn.Module, ranks: int, pinned: bool) -> int:
    """What a checkpoint is written from while training goes on: the copy of the rank that has the largest share.

    pinned: torch takes a power of two for each tensor.
    """
    shares, sizes = Counter[int](), [parameter.numel() for parameter in model.parameters()]
    for owner, size in zip(deal(sizes, ranks), sizes, strict=True):
        shares[owner] += 1 << (FULL * size - 1).bit_length() if pinned else FULL * size
    return len(KEYS) * max(shares.values())


def _copied(mask: SampleMask) -> int:
    """Rows of keys, and of values, that attention gathers from the packed buffer."""
    return sum(group.keys * len(group.members) for group in mask.groups)


def _extent(mask: SampleMask) -> int:
    """Scores of the dense calls that attention is made of."""
    return sum(group.rows * group.keys * len(group.members) for group in mask.groups)
