"""CUDA graphs of decoders: a pass is recorded once for each shape and then replayed as one launch.

A text of a few tokens keeps a GPU busy for microseconds a layer, less than Python needs to start it. So the decoders
`*_static.py` have a form in which no shape, address or launch depends on a value: each step is a function without
arguments that reads and writes buffers made before. On a CPU the same functions are simply called, and tested there.

Sources are padded to a few widths and numbers, `bucket`, so that few graphs serve all.

Shapes: B sources, S tokens of the longest.
"""

import gc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pretrain.models import EncoderDecoder, SourceRows, static
from pretrain.models.incremental import KeysValues

ShapeT = TypeVar("ShapeT")
KEPT = 16  # shapes; each holds buffers, and on a GPU its graphs
MOST_BYTES = 4 << 30  # of all buffers of shapes of one kind
FEWEST_TOKENS = 16  # of a padded text; all widths are multiples of 8, as fused attention wants its masks


def bucket(count: int, fewest: int = 1) -> int:
    """The least of fewest * (1, 1.5, 2, 3, 4, 6, ..) that holds `count`: at most a third of it is padding.

    That is, of those among them that are whole.
    """
    size = fewest
    while size < count:
        if size + size // 2 >= count and size % 2 == 0:
            return size + size // 2
        size *= 2
    return size


def nothing(*shape: int) -> int:
    """Bytes of what is too small to count."""
    return 0


class Shapes(Generic[ShapeT]):
    """What was made for the shapes used last: at most `KEPT`, of at most `MOST_BYTES` unless there is only one.

    Args:
        make: makes it for a shape.
        size: how many bytes that takes.
    """

    def __init__(self, make: Callable[..., ShapeT], size: Callable[..., int] = nothing) -> None:
        self.make, self.size = make, size
        self.made: OrderedDict[tuple[int, ...], ShapeT] = OrderedDict()

    def __call__(self, *shape: int) -> ShapeT:
        if shape not in self.made:
            self._make_room(self.size(*shape))
            self.made[shape] = self.make(*shape)
        self.made.move_to_end(shape)
        return self.made[shape]

    def _make_room(self, needed: int) -> None:
        before = len(self.made)
        while self.made and (len(self.made) == KEPT or self._taken() + needed > MOST_BYTES):
            self.made.popitem(last=False)
        if len(self.made) < before:
            gc.collect()  # a graph and what it belongs to hold each other

    def _taken(self) -> int:
        return sum(self.size(*shape) for shape in self.made)


class Graphed:
    """A function of nothing that always launches the same work on the same buffers, and on a GPU a graph of it.

    The first call runs it as it is, which loads what recording must not load; the second records it. A shape that comes
    once is so never paid for. The graphs of a process share their scratch memory: they must run one after another, and
    what one leaves for another must lie in buffers that were made outside of both.
    """

    pool: Any = None

    def __init__(self, run: Callable[[], None], device: torch.device) -> None:
        self.run, self.device, self.calls = run, device, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self.calls += 1
        if self.device.type == "cuda" and self.calls == 2:
            self._record()
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()

    def _record(self) -> None:
        if Graphed.pool is None:
            Graphed.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that pin memory, may go on.
        with torch.cuda.graph(graph, pool=Graphed.pool, capture_error_mode="thread_local"):
            self.run()
        self.graph = graph


class Made(Protocol):
    """What is made for a shape of sources."""

    sources: "PaddedSources"


MadeT = TypeVar("MadeT", bound=Made)


def filled(shapes: Shapes[MadeT], source: SourceRows) -> MadeT:
    """What is there for the shape of these sources, with them in its buffers."""
    made = shapes(*PaddedSources.shape(source))
    made.sources.fill(source)
    return made


class PaddedSources:
    """Buffers for B sources of S tokens, and what the decoder reads of them; on the model's device.

    memory: keys and values [B, S, H, E] of each decoder layer. A source of length 0 is padding.
    """

    def __init__(self, model: EncoderDecoder, sources: int, width: int) -> None:
        device = model.shared.weight.device
        self.model = model
        self.tokens_BS = torch.full((sources, width), model.ids.pad, device=device)
        self.length_B = torch.zeros(sources, dtype=torch.int64, device=device)
        self.memory: list[KeysValues] = static.keys_values_buffers(model, sources, width)
        self.bias_B11S = model.shared.weight.new_zeros(sources, 1, 1, width)

    @staticmethod
    def shape(source: SourceRows) -> tuple[int, int]:
        """(B, S) that hold these sources."""
        longest = max(source.memory_range(index)[1] for index in range(source.n_samples))
        return bucket(source.n_samples), bucket(longest, FEWEST_TOKENS)

    @staticmethod
    def size(model: EncoderDecoder, sources: int, width: int) -> int:
        """Bytes of the buffers for these."""
        return static.keys_values_bytes(model, sources * width)

    def fill(self, source: SourceRows) -> None:
        """Takes in packed sources; outside of any graph."""
        lengths = [source.memory_range(index)[1] for index in range(source.n_samples)]
        lengths += [0] * (len(self.length_B) - len(lengths))
        self.length_B.copy_(torch.tensor(lengths))
        self.tokens_BS.fill_(self.model.ids.pad)
        self.tokens_BS[source.sample_R, source.positions_R] = source.tokens_R

    def read(self) -> tuple[Tensor, Tensor]:
        """Encodes and fills `memory`: memory_BSD and which of its columns are tokens."""
        # Padding has one token, because a row that reads nothing is no number.
        inside_BS = static.inside(self.length_B.clamp(min=1), self.tokens_BS.shape[1])
        memory_BSD = static.encode(self.model, self.tokens_BS, inside_BS)
        static.project_memory(self.model, memory_BSD, self.memory)
        self.bias_B11S.copy_(static.bias(inside_BS[:, None, None], self.bias_B11S.dtype))
        return memory_BSD, inside_BS
