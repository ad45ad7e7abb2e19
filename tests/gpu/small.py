"""Every kernel once on small sizes: what compute-sanitizer watches. `python -m tests.gpu.small`"""

import torch

from parlance_kernels import exit_copy, offramp_stats, sample_attention, vocab_loss
from parlance_kernels.exit_copy.active_rows import compact_rows, gather_rows, scatter_rows_
from tests.gpu.cases import differentiated, indices, mask_of, states, vocab_problem


def main(device: str = "cuda", backend: str = "cuda") -> None:
    """Runs them; whoever watches says what was wrong."""
    for dtype in (torch.bfloat16, torch.float32):
        table, out = states((9, 24), dtype, device, 0), states((7, 24), dtype, device, 1)
        given = table.requires_grad_(), out.requires_grad_()
        left, stays = indices(device, [0, 3], [1, 2, 6])
        made = exit_copy(given[0], 4, given[1], left, stays, False, backend=backend)
        torch.autograd.grad([x.sum() for x in made], given)
        offramp_stats(states((3, 1003), dtype, device, 2), [0, 5], backend=backend)
        for streams in (1, 2, 3):
            tensors, arguments = vocab_problem(device, dtype, 3, streams, 2, 513, 16, streams)
            given = [tensors[0].requires_grad_(), tensors[1].requires_grad_()]
            differentiated(vocab_loss(*given, **arguments, label_smoothing=0.1, backend=backend)[0], given)
    active = torch.tensor([True, False, True, True, False], device=device)
    rows, count = compact_rows(active, backend=backend)
    x = states((5, 24), torch.bfloat16, device, 3)
    scatter_rows_(x, rows, count, gather_rows(x, rows, count, backend=backend), backend=backend)
    for width in (32, 64, 96, 128):
        mask = mask_of([(5, 4), (70, 30), (0, 3), (40, 0)])
        sizes = mask.n_rows, mask.n_keys, mask.n_keys
        qkv = [states((n, 2, width), torch.bfloat16, device, n).requires_grad_() for n in sizes]
        for dropout in (0.0, 0.3):
            o = sample_attention(*qkv, mask, dropout_p=dropout, backend=backend)
            torch.autograd.grad(o.sum(), qkv)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
