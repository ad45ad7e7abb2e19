"""Is an off-ramp right when it is sure? Accuracy, confidence and calibration of every layer, and where tokens leave.

On a fixed batch, with every row through every layer: what each off-ramp says of the same tokens can be compared.

Shapes: L layers, R rows of the batch.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain.engine import Engine
from pretrain.loop import StepReport
from pretrain.models import EncoderDecoder
from pretrain.models.early_exit import off_ramp
from pretrain.objectives.batch import TokenBatch
from pretrain.watch.tensorboard import TensorBoard

THRESHOLD = 0.5  # nats, the paper's choice (ELMER, section 5.1)
BINS = 10


class ExitRamps:
    """Hook that writes them every `every` updates; collective, as ZeRO-3 gathers weights on all ranks together."""

    def __init__(self, engine: Engine, batch: Any, every: int, board: TensorBoard | None) -> None:
        self.engine, self.batch, self.every, self.board = engine, batch, every, board

    def after_step(self, report: StepReport) -> None:
        if not report.due(self.every):
            return
        module = self.engine.module
        module.eval()
        with self.engine.gathered():
            found, exit_R = measure(module.model, self.batch.to(self.engine.world.device))
        module.train()
        if self.board is not None:
            self.board.scalars(report.step, found)
            self.board.histogram(report.step, "exits/layer", exit_R)


@torch.no_grad()
def measure(model: EncoderDecoder, batch: TokenBatch) -> tuple[dict[str, float], Tensor]:
    """Figures of each layer, and the first (int64 [R], from 1) at which each row with a target is sure.

    Nothing is copied here; where states are, those of later layers and their entropies differ a little.

    accuracy: share of right tokens; confidence: mean probability of the likeliest; entropy: its mean in nats;
    calibration_error: |accuracy - confidence| over ten bins of confidence, weighted by their rows (Guo et al. 2017).
    """
    rows: Any = batch.rows
    h_LD = model.decode_every_layer(rows, model.encode(batch.source))
    layers = len(model.decoder.layers)
    ramps = [off_ramp(model.ramp(layer + 1), part) for layer, part in enumerate(h_LD.chunk(layers))]
    target_R = torch.full_like(rows.tokens_R, model.ids.pad).index_copy(0, rows.out_L, batch.target_L)
    real_R = target_R != model.ids.pad
    entropy_LR, token_LR, log_p_LR = (torch.stack(x)[:, real_R].cpu() for x in zip(*ramps, strict=True))
    right_LR = (token_LR == target_R[real_R].cpu()).double()
    sure_LR = log_p_LR.double().exp()
    found: dict[str, float] = {}
    for layer in range(layers if real_R.any() else 0):
        found |= {
            f"exits/accuracy_{layer + 1}": float(right_LR[layer].mean()),
            f"exits/confidence_{layer + 1}": float(sure_LR[layer].mean()),
            f"exits/entropy_{layer + 1}": float(entropy_LR[layer].mean()),
            f"exits/calibration_error_{layer + 1}": calibration_error(sure_LR[layer], right_LR[layer]),
        }
    early_LR = entropy_LR < THRESHOLD
    early_LR[-1] = True
    exit_R = early_LR.int().argmax(dim=0) + 1
    if real_R.any():
        found["exits/mean_layer"] = float(exit_R.double().mean())
    return found, exit_R


def calibration_error(sure_R: Tensor, right_R: Tensor) -> float:
    """Expected calibration error: how far confidence and accuracy are apart, in bins of equal width."""
    bin_R = (sure_R * BINS).long().clamp(max=BINS - 1)
    apart = torch.zeros(BINS, dtype=torch.float64).index_add(0, bin_R, right_R.double() - sure_R.double())
    return float(apart.abs().sum() / len(sure_R))
