"""One model of random weights as Parlance, transformers and CTranslate2 have it, and sources that all of them read.

Its position tables are ten times as large as its token table: otherwise a random model with tied embeddings says one
token for ever, and every beam agrees with every other. A bias keeps special tokens from being said, so that all sides
write to the full length.

Shapes: B sources, S tokens of each, T tokens of a text, R packed rows, V vocabulary.
"""

import importlib.util
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from harness import require
from torch import Tensor

from finetune.decoding import ArDecoding, Generated, MaskPredictOptions, beam_search, mask_predict
from finetune.decoding.beam_static import StaticBeamSearch
from finetune.decoding.mask_predict_static import StaticMaskPredict
from pretrain.bundles.description import BART_NAMES
from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder, SourceRows, SpecialIds
from pretrain.models.incremental import StreamName
from pretrain.models.patterns import ArLayout
from pretrain.models.rows import to_device


@dataclass(frozen=True)
class Twins:
    """Everything is built when it is first asked for.

    tokens: of a text, with BOS and EOS where a decoder writes left to right, as transformers counts new tokens, which
    are as many passes; between BOS and EOS where it writes all at once. source: tokens of a source, with BOS and EOS.
    """

    config: ModelConfig
    tokens: int
    source: int
    device: str = "cpu"

    @property
    def vocabulary(self) -> int:
        assert self.config.vocab_size is not None
        return self.config.vocab_size

    @property
    def ids(self) -> SpecialIds:
        return SpecialIds(bos=0, pad=1, eos=2, mask=self.vocabulary - 1, unk=3)

    @property
    def special(self) -> list[int]:
        return [self.ids.bos, self.ids.pad, self.ids.eos, self.ids.mask, self.ids.unk]

    @property
    def layout(self) -> ArLayout:
        return ArLayout.aligned("eos_first", self.ids)

    @cached_property
    def ours(self) -> EncoderDecoder:
        """Our model; its length predictor says `tokens` tokens between BOS and EOS."""
        torch.manual_seed(0)
        model = EncoderDecoder(self.config, self.ids).eval()
        with torch.no_grad():
            for name, table in model.named_parameters():
                if "embed_positions" in name:
                    table.mul_(10.0)
            bias_V = torch.zeros(self.vocabulary)
            bias_V[self.special] = -60.0
            model.head.bias_V = bias_V
            model.length_head.weight.zero_()[self.tokens + 2] = model.encode(self._sources(1)).mean(dim=0)
        return model.to(self.device)

    def theirs(self, attention: str) -> Any:
        """transformers' model with our weights."""
        return _theirs(self, attention)

    @cached_property
    def translator(self) -> Any:
        """CTranslate2 with our weights on as many threads as torch has; None where there is none for the device."""
        if importlib.util.find_spec("ctranslate2") is None:
            return None
        import ctranslate2

        if self.device == "cuda" and not ctranslate2.get_cuda_device_count():
            return None
        from ctranslate2.converters.transformers import BartLoader

        model = self.theirs("sdpa").cpu()
        model.config.normalize_before = False  # the converter expects a field that transformers has dropped
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            spec = BartLoader().get_model_spec(model)
            spec.register_source_vocabulary(self.words)
            spec.register_target_vocabulary(self.words)
            spec.config.decoder_start_token = "</s>"
            spec.validate()
            spec.optimize(quantization="float32")
            spec.save(folder)
            threads = torch.get_num_threads()
            found = ctranslate2.Translator(
                folder, device=self.device, compute_type="float32", inter_threads=1, intra_threads=threads
            )
        model.to(self.device)
        return found

    @cached_property
    def words(self) -> list[str]:
        """The vocabulary of CTranslate2, which reads and writes words."""
        words = [f"{index}" for index in range(self.vocabulary)]
        ids = self.ids
        for index, word in ((ids.bos, "<s>"), (ids.pad, "<pad>"), (ids.eos, "</s>"), (ids.unk, "<unk>")):
            words[index] = word
        return words

    def sources(self, batch: int = 1) -> SourceRows:
        """Random sources with BOS and EOS, equally long."""
        return to_device(self._sources(batch), torch.device(self.device))

    def _sources(self, batch: int) -> SourceRows:
        tokens_BS = np.random.default_rng(0).integers(4, self.vocabulary - 1, (batch, self.source))
        tokens_BS[:, 0], tokens_BS[:, -1] = self.ids.bos, self.ids.eos
        return SourceRows.pack(list(tokens_BS))

    def our_beam(self, source: SourceRows, beam: int, stream: StreamName = "content") -> Generated:
        """Left to right as BART writes (`content`) or as JANUS does (`query`)."""
        return beam_search(self.ours, source, self.layout, stream, self._beam(beam))

    def graphed_beam(self, beam: int, stream: StreamName = "content") -> StaticBeamSearch:
        """Writes as `our_beam`, by CUDA graphs of the model as it is now."""
        return StaticBeamSearch(self.ours, self.layout, stream, self._beam(beam))

    def our_pass(self, source: SourceRows, iterations: int = 0) -> Generated:
        """All at once, in 1 + `iterations` decoder passes."""
        return mask_predict(self.ours, source, self._pass(iterations))

    def graphed_pass(self, iterations: int = 0) -> StaticMaskPredict:
        """Writes as `our_pass`, by CUDA graphs of the model as it is now."""
        return StaticMaskPredict(self.ours, self._pass(iterations))

    def _beam(self, beam: int) -> ArDecoding:
        return ArDecoding(beam=beam, max_length=self.tokens)

    def _pass(self, iterations: int) -> MaskPredictOptions:
        return MaskPredictOptions(iterations=iterations, length_beam=1, max_length=self.tokens + 2)

    def their_beam(
        self, source: SourceRows, beam: int, attention: str = "sdpa", free_end: bool = False, **more: Any
    ) -> Any:
        """`generate` with the options of `our_beam`.

        transformers forces an EOS without counting what it costs, we count it. A processor forces it in our way, so
        that both search for the same text; with `free_end` transformers does it in its own.
        """

        def end(ids: Tensor, scores: Tensor) -> Tensor:
            if ids.shape[1] < self.tokens:
                return scores
            only = torch.full_like(scores, -torch.inf)
            only[:, self.ids.eos] = scores[:, self.ids.eos]
            return only

        return self.theirs(attention).generate(
            source.tokens_R.view(source.n_samples, -1), num_beams=beam, do_sample=False, use_cache=True,
            max_new_tokens=self.tokens, forced_bos_token_id=self.ids.bos,
            forced_eos_token_id=self.ids.eos if free_end else None, length_penalty=1.0,
            logits_processor=[] if free_end else [end], **more,
        )  # fmt: skip

    @torch.no_grad()
    def their_look(self, source: SourceRows, tokens_BT: Tensor) -> Any:
        """transformers' whole output where its decoder may look in both directions."""
        batch, length = tokens_BT.shape
        return self.theirs("sdpa")(
            input_ids=source.tokens_R.view(batch, -1),
            decoder_input_ids=tokens_BT,
            decoder_attention_mask=torch.ones(batch, 1, length, length, dtype=torch.bool, device=tokens_BT.device),
            output_hidden_states=True,
        )

    def ct2_words(self, source: SourceRows, beam: int, tokens: int | None = None) -> list[list[int]]:
        """CTranslate2's texts behind BOS. At the full length it stops without an EOS, so it writes one token more."""
        texts = [[self.words[index] for index in line] for line in source.tokens_R.view(source.n_samples, -1).tolist()]
        length = tokens or self.tokens
        made = self.translator.translate_batch(
            texts, target_prefix=[["<s>"]] * len(texts), beam_size=beam, min_decoding_length=length,
            max_decoding_length=length,
        )  # fmt: skip
        return [[self._numbers[word] for word in found.hypotheses[0][1:]] for found in made]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}


@cache
def _theirs(twins: Twins, attention: str) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    fields: dict[str, Any] = {bart: getattr(twins.config, name) for name, names in BART_NAMES.items() for bart in names}
    fields["attn_implementation"] = attention
    model = BartForConditionalGeneration(BartConfig(**fields))
    state = twins.ours.state_dict()
    weights = {f"model.{k}": v for k, v in state.items() if not k.startswith(("head.", "length_head."))}
    weights["final_logits_bias"] = state["head.bias_V"][None]
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    require(not unknown, f"transformers' BART must know all weights, not {unknown}")
    return model.eval().to(twins.device)
