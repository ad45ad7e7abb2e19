"""Seconds to write one text on a CPU: BART's usual toolkits at beam 5 over our decoders, all with the same weights.

The model has BART-base's shape and random weights. Its position tables are ten times as large as its token table:
otherwise a random model with tied embeddings says one token for ever, and every beam agrees with every other.
A bias keeps special tokens from being said, so that all sides write to the full length.
"""

import importlib.util
import sys
import tempfile
from functools import cache
from typing import Any

import numpy as np
import torch
from harness import Row, medians, require
from torch import Tensor

from finetune.decoding import ArDecoding, Generated, MaskPredictOptions, beam_search, mask_predict
from pretrain.bundles.description import BART_NAMES
from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder, SourceRows, SpecialIds
from pretrain.models.patterns import ArLayout

IDS = SpecialIds(bos=0, pad=1, eos=2, mask=50_264, unk=3)
SPECIAL = [IDS.bos, IDS.pad, IDS.eos, IDS.mask, IDS.unk]
CONFIG = ModelConfig(
    vocab_size=50_265, d_model=768, encoder_layers=6, decoder_layers=6, heads=12, ffn_dim=3072, logits_bias=True
)
BEAM, TOKENS, REPEATS = 5, 64, 5
# Of the peer's implementations of attention the faster one counts.
ATTENTIONS = ("sdpa", "eager")
SHAPE = f"BART-base, batch 1, source {TOKENS}, {TOKENS} new tokens"


@cache
def ours() -> EncoderDecoder:
    """Our model; its length predictor says TOKENS tokens between BOS and EOS for `source()`."""
    torch.manual_seed(0)
    model = EncoderDecoder(CONFIG, IDS).eval()
    with torch.no_grad():
        for name, table in model.named_parameters():
            if "embed_positions" in name:
                table.mul_(10.0)
        bias_V = torch.zeros(50_265)
        bias_V[SPECIAL] = -60.0
        model.head.bias_V = bias_V
        model.length_head.weight.zero_()[TOKENS + 2] = model.encode(source()).mean(dim=0)
    return model


@cache
def theirs(attention: str) -> Any:
    """transformers' model with our weights."""
    from transformers import BartConfig, BartForConditionalGeneration

    fields: dict[str, Any] = {bart: getattr(CONFIG, name) for name, names in BART_NAMES.items() for bart in names}
    fields["attn_implementation"] = attention
    model = BartForConditionalGeneration(BartConfig(**fields))
    weights = {f"model.{k}": v for k, v in ours().state_dict().items() if not k.startswith(("head.", "length_head."))}
    weights["final_logits_bias"] = ours().state_dict()["head.bias_V"][None]
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    require(not unknown, f"transformers' BART must know all weights, not {unknown}")
    return model.eval()


def source() -> SourceRows:
    """One random source of TOKENS tokens with BOS and EOS."""
    tokens = np.random.default_rng(0).integers(4, 50_264, TOKENS)
    tokens[0], tokens[-1] = IDS.bos, IDS.eos
    return SourceRows.pack([tokens])


def our_beam(beam: int = BEAM) -> Generated:
    """TOKENS tokens with BOS and EOS, as transformers counts new tokens, which are as many decoder passes."""
    options = ArDecoding(beam=beam, max_length=TOKENS)
    return beam_search(ours(), source(), ArLayout.aligned("eos_first", IDS), "content", options)


def our_pass() -> Generated:
    """TOKENS tokens between BOS and EOS in one decoder pass."""
    return mask_predict(ours(), source(), MaskPredictOptions(iterations=0, length_beam=1, max_length=TOKENS + 2))


def their_beam(attention: str, beam: int = BEAM, **more: Any) -> Any:
    """`generate` with the options of `our_beam`.

    transformers forces an EOS without counting what it costs, we count it. The processor forces it in our way, so that
    both search for the same text.
    """

    def end(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] < TOKENS:
            return scores
        only = torch.full_like(scores, -torch.inf)
        only[:, IDS.eos] = scores[:, IDS.eos]
        return only

    return theirs(attention).generate(
        source().tokens_R[None], num_beams=beam, do_sample=False, use_cache=True, max_new_tokens=TOKENS,
        forced_bos_token_id=IDS.bos, forced_eos_token_id=None, length_penalty=1.0, logits_processor=[end], **more,
    )  # fmt: skip


def check_beam() -> str:
    """Refuses unless both beams find the same tokens with the same score; says so."""
    found = our_beam()
    ids = found.tokens[0].tolist()
    for attention in ATTENTIONS:
        made = their_beam(attention, return_dict_in_generate=True, output_scores=True)
        require(made.sequences[0, 2:-1].tolist() == ids, f"{attention}: both beams must find the same tokens")
        # Each divides the sum of log-probabilities by its own count of tokens; ours leaves BOS out.
        off = abs(float(made.sequences_scores[0]) * TOKENS / (found.scores[0] * (TOKENS - 1)) - 1)
        require(off < 1e-5, f"{attention}: both beams must give the text the same score, they differ by {off:.1e}")
    require(found.passes == TOKENS and len(set(ids)) > TOKENS // 2, "the text must be long and varied")
    return f"same {len(ids)} token ids and score"


@torch.no_grad()
def check_pass() -> str:
    """Refuses unless transformers' decoder, let look in both directions, would write what our one pass wrote."""
    found = our_pass()
    tokens = torch.tensor([IDS.bos, *[IDS.mask] * TOKENS, IDS.eos])
    everything = torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool)
    model = theirs("sdpa")
    logits_TV = model(
        input_ids=source().tokens_R[None], decoder_input_ids=tokens[None], decoder_attention_mask=everything
    ).logits[0, 1:-1]
    score = float(logits_TV.log_softmax(dim=1).amax(dim=1).sum()) / (TOKENS + 2)
    same = logits_TV.argmax(dim=1).tolist() == found.tokens[0].tolist()
    require(same and found.passes == 1, f"one pass must write the {TOKENS} tokens their decoder likes best")
    require(abs(score / found.scores[0] - 1) < 1e-5, "one pass must score them as transformers' decoder does")
    return f"same {TOKENS} token ids as transformers' decoder without its causal mask"


def nar_row() -> Row:
    """transformers left to right over our one pass."""
    agreed = check_pass()
    *beams, one_pass = medians([lambda a=a: their_beam(a) for a in ATTENTIONS] + [our_pass], REPEATS)
    detail = f"{_peer(beams)} over {one_pass * 1e3:.0f} ms; {agreed}; {SHAPE}"
    return Row("nar_latency", min(beams) / one_pass, 12.0, "min", detail)


def ar_row() -> Row:
    """transformers left to right over our beam."""
    agreed = check_beam()
    *beams, beam = medians([lambda a=a: their_beam(a) for a in ATTENTIONS] + [our_beam], REPEATS)
    detail = f"{_peer(beams)} over {beam * 1e3:.0f} ms; {agreed}; {SHAPE}"
    return Row("ar_latency", min(beams) / beam, 1.0, "min", detail)


def ct2_rows() -> list[Row]:
    """CTranslate2 left to right over our one pass; no row where CTranslate2 is not installed."""
    if importlib.util.find_spec("ctranslate2") is None:
        print("ct2_latency is left out: ctranslate2 is not installed", file=sys.stderr, flush=True)
        return []
    words = [f"{index}" for index in range(50_265)]
    for index, word in ((IDS.bos, "<s>"), (IDS.pad, "<pad>"), (IDS.eos, "</s>"), (IDS.unk, "<unk>")):
        words[index] = word
    translator = _translator(words)
    text = [words[index] for index in source().tokens_R.tolist()]

    def their_words(beam: int) -> list[str]:
        made = translator.translate_batch(
            [text], target_prefix=[["<s>"]], beam_size=beam, min_decoding_length=TOKENS, max_decoding_length=TOKENS
        )
        return made[0].hypotheses[0]

    # It stops at the full length without an EOS, so only greedy search has the same best text.
    greedy = [words[index] for index in our_beam(beam=1).tokens[0]]
    require(their_words(beam=1)[1:-1] == greedy, "CTranslate2's greedy text must be ours")
    beam, one_pass = medians([lambda: their_words(BEAM), our_pass], REPEATS)
    detail = f"CTranslate2 fp32 {beam * 1e3:.0f} ms over {one_pass * 1e3:.0f} ms; same greedy token ids; {SHAPE}"
    return [Row("ct2_latency", beam / one_pass, None, "report", detail)]


def _translator(words: list[str]) -> Any:
    """CTranslate2 with our weights on as many threads as torch has."""
    import ctranslate2
    from ctranslate2.converters.transformers import BartLoader

    model = theirs("eager")
    model.config.normalize_before = False  # the converter expects a field that transformers has dropped
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        spec = BartLoader().get_model_spec(model)
        spec.register_source_vocabulary(words)
        spec.register_target_vocabulary(words)
        spec.config.decoder_start_token = "</s>"
        spec.validate()
        spec.optimize(quantization="float32")
        spec.save(folder)
        return ctranslate2.Translator(
            folder, device="cpu", compute_type="float32", inter_threads=1, intra_threads=torch.get_num_threads()
        )


def _peer(seconds: list[float]) -> str:
    each = " and ".join(f"{name} {s * 1e3:.0f} ms" for name, s in zip(ATTENTIONS, seconds, strict=True))
    return f"transformers beam {BEAM}, {each}: the faster"
