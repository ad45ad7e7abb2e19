"""The fused vocabulary loss: projection, cross-entropy and symmetric KL without the logits of the whole batch.

Shapes: R rows, D width, V vocabulary, T cross-entropy terms, P tuples, K streams in a tuple, Q stream pairs.
"""

from collections.abc import Sequence

from torch import Tensor

from parlance_kernels.backend import resolve
from parlance_kernels.vocab_loss import cuda
from parlance_kernels.vocab_loss.chunked import CHUNK_ROWS, Given, Terms, VocabLoss
from parlance_kernels.vocab_part import VocabPart


def vocab_loss(
    h_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    term_R: Tensor,
    tuple_PK: Tensor,
    ce_scale: Sequence[float],
    kl_pairs: Sequence[tuple[int, int]] = (),
    kl_scale: Sequence[float] = (),
    label_smoothing: float = 0.0,
    bias_V: Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
    part: VocabPart | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled sum of cross-entropies over rows and symmetric KLs over tuples of rows.

    Args:
        h_RD: hidden states of the rows that carry a loss.
        weight_VD, bias_V: the vocabulary projection, logits = h weight^T + bias.
        target_R: int64, the right token of each row.
        term_R: int64, which cross-entropy term (index into `ce_scale`) the row belongs to.
        tuple_PK: int64, rows that predict the same token in K streams; a row occurs at most once. May be empty.
        ce_scale: factor of each cross-entropy term in the total.
        kl_pairs, kl_scale: pairs of streams (columns of `tuple_PK`) and the factor of each symmetric KL.
        label_smoothing: mass spread uniformly over all V, the target included.
        chunk_rows: rows whose logits exist at one time; None for what suits the backend.
        backend: a name that `parlance_kernels.resolve` accepts.
        part: which tokens `weight_VD` and `bias_V` are of; None: all. Every rank of its group calls this with the same
            rows, and gets the same results and, but for the weight and the bias, the same gradients. The kernel knows
            whole vocabularies alone, so a part goes through PyTorch on a GPU, too.

    Returns:
        total: differentiable scalar = sum of scale * term.
        ce_T: detached sum of each cross-entropy term; kl_Q: detached sum of half the two KL directions.

    Raises:
        ValueError: the backend is unknown; or, with the kernel, more streams, terms or pairs than it takes.
    """
    with_kernel = resolve(backend) == "cuda" and part is None  # the kernel knows no parts of a vocabulary
    if chunk_rows is None:
        chunk_rows = cuda.CHUNK_ROWS if with_kernel and h_RD.is_cuda else CHUNK_ROWS
    terms = Terms(tuple(ce_scale), tuple(kl_pairs), tuple(kl_scale), label_smoothing, chunk_rows, part)
    given = Given(h_RD, weight_VD, bias_V, target_R, term_R, tuple_PK)
    total, ce_T, kl_Q = cuda.vocab_loss_op(given, terms) if with_kernel else VocabLoss.apply(terms, *given)
    return total, ce_T, kl_Q
