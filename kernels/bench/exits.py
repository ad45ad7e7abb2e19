"""LPLM steps: k permutations at once, against k passes in which every row goes through every layer."""

import numpy as np
import torch
from harness import Row, medians, require
from steps import IDS, compare, step
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder, ExitRows, Stream, VocabTargets, pack_streams
from pretrain.objectives import build
from pretrain.objectives.lplm import ExitExample, Lplm

CONFIG = ModelConfig(
    vocab_size=4096, encoder_layers=6, decoder_layers=6, dropout=0.0, attention_dropout=0.0, length_classes=8
)
SAMPLES, LENGTH = 4, 128
REPEATS, REPEATS_OF_ONE = 5, 25  # one permutation is soon done: the median of few would be the machine's mood


def rows() -> list[Row]:
    """`lplm_k10`, `lplm_k10_decoder` and `lplm_k1_decoder`."""
    torch.manual_seed(0)
    precise, model = EncoderDecoder(CONFIG, IDS).double().train(), EncoderDecoder(CONFIG, IDS).train()
    small = _Case(precise, 10, samples=2, length=24)
    off = compare(precise, small.step, small.plain_step, 1e-10)
    ten, one = _Case(model, 10), _Case(model, 1)
    compare(model, ten.step, ten.plain_step, 1e-5)
    whole, plain = medians([ten.step, ten.plain_step], REPEATS)
    shape = f"d=256, 6+6 layers, V=4096, B={SAMPLES}, S=T={LENGTH}; gradients agree to {off:.1e} in fp64"
    made = [Row("lplm_k10", whole / plain, 0.52, "max", f"{whole * 1e3:.0f} ms over {plain * 1e3:.0f} ms; {shape}")]
    for case, target, repeats in ((ten, 0.5, REPEATS), (one, 0.72, REPEATS_OF_ONE)):
        apart = case.decoders_differ_by()
        require(apart <= 1e-4, f"states must agree, they differ by {apart:.1e}")
        quick, plain = medians([case.decoder, case.plain_decoder], repeats)
        detail = f"{quick * 1e3:.0f} ms over {plain * 1e3:.0f} ms; the decoder alone; states agree to {apart:.1e}"
        made.append(Row(f"lplm_k{case.copies}_decoder", quick / plain, target, "max", detail))
    return made


class _Case:
    """Random texts whose decoder has `length` rows, each with layers of its own, in both ways to compute them."""

    def __init__(self, model: EncoderDecoder, copies: int, samples: int = SAMPLES, length: int = LENGTH) -> None:
        made = build({"name": "lplm", "copies": copies}, IDS, None, CONFIG)
        assert isinstance(made, Lplm)
        self.model, self.objective, self.copies = model, made, copies
        self.given = _texts(copies, samples, length)
        self.batch = made.collate(self.given)
        source = self.batch.source
        streams = [
            Stream(np.full(length, IDS.mask), np.arange(length), [(length, length, 0, 0, 0, 0)],
                   source.memory_range(index), (0, length), example.target[1:], term=0)
            for index, example in enumerate(self.given)
        ]  # fmt: skip
        self.rows, self.target_R, self.term_R = pack_streams(streams, source.mask.n_rows)
        self.exit_KR = torch.from_numpy(np.concatenate([e.exits for e in self.given], axis=1))
        with torch.no_grad():
            self.memory_MD = model.encode(source)
        self.upstream_D = torch.randn(CONFIG.d_model, dtype=self.memory_MD.dtype)

    def step(self) -> Tensor:
        return step(self.model, self.objective, self.batch)

    def plain_step(self) -> Tensor:
        """A pass a copy: encoder, every row through every layer, the head on every row."""
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for exit_R in self.exit_KR:
            h_RD = self._through_every_layer(exit_R, self.model.encode(self.batch.source))
            scale = 1.0 / self.objective.counts(self.batch)["lplm"]
            nothing = self.target_R.new_empty((0, 1))
            loss, _, _ = self.model.head(h_RD, VocabTargets(self.target_R, self.term_R, nothing, [scale]))
            loss.backward()
            total = total + loss.detach()
        return total

    def decoder(self) -> None:
        """Forward and backward from the encoder's output to the states that leave."""
        self.model.zero_grad(set_to_none=True)
        h_ND = self.model.decode(self.batch.rows, self.memory_MD.requires_grad_())
        h_ND.backward(self.upstream_D.expand_as(h_ND))

    def plain_decoder(self) -> None:
        self.model.zero_grad(set_to_none=True)
        for exit_R in self.exit_KR:
            h_RD = self._through_every_layer(exit_R, self.memory_MD.requires_grad_())
            h_RD.backward(self.upstream_D.expand_as(h_RD))

    @torch.no_grad()
    def decoders_differ_by(self) -> float:
        """Largest difference between the states of any token of any copy."""
        rows = self.batch.rows
        assert isinstance(rows, ExitRows)
        by_copy = self.model.decode(rows, self.memory_MD)[rows.state_P].split([e.exits.size for e in self.given])
        ours = torch.cat([states.unflatten(0, (self.copies, -1)) for states in by_copy], dim=1)
        plain = torch.stack([self._through_every_layer(exit_R, self.memory_MD) for exit_R in self.exit_KR])
        return float((ours - plain).abs().max())

    def _through_every_layer(self, exit_R: Tensor, memory_MD: Tensor) -> Tensor:
        model, rows = self.model, self.rows
        x_RD = model.decoder.embed(model.shared(rows.tokens_R) * model.scale, rows.positions_R)
        state_RD = torch.zeros_like(x_RD)
        for number, layer in enumerate(model.decoder.layers, start=1):
            out_RD = layer(x_RD, rows.n_keys, None, memory_MD, rows.self_mask, rows.cross_mask)
            state_RD = torch.where((exit_R == number)[:, None], out_RD, state_RD)
            x_RD = torch.where((exit_R <= number)[:, None], state_RD, out_RD)
        return model.decoder.layer_norm(state_RD)


def _texts(copies: int, samples: int, length: int) -> list[ExitExample]:
    rng, made = np.random.default_rng(0), []
    for _ in range(samples):
        source, target = (
            np.concatenate([[IDS.bos], rng.integers(5, 4096, n - 2), [IDS.eos]]) for n in (length, length + 1)
        )
        exits = rng.integers(1, CONFIG.decoder_layers + 1, (copies, length))
        made.append(ExitExample(source, target, np.empty(0, np.int64), exits))
    return made
