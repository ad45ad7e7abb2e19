"""Whether two sides write the same; every function refuses, and so ends the benchmark, if they do not.

Rounding may swap two tokens that are equally likely to the last digits, and the text then goes on differently. So of
sixteen texts one may differ; how many do not is told.

Shapes: B sources, S tokens of each, T tokens of a text, N of them between BOS and EOS, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from harness import require
from torch import Tensor
from torch.nn.functional import pad
from twins import Twins

from finetune.decoding import Generated
from pretrain.models import EncoderDecoder, SourceRows, reference

TEXTS_A_TIE = 16
ROUNDING = 1e-5


@dataclass(frozen=True)
class Agreed:
    """passes: of the decoder over the batch. says: what was compared, and with what result."""

    passes: int
    says: str


def agree(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], what: str) -> str:
    """Refuses unless the texts are the same but for ties; tells what is the same."""
    require(len(found) == len(expected) and all(map(len, found)), f"{what}: every source must have a text")
    same = sum(list(a) == list(b) for a, b in zip(found, expected, strict=True))
    require(
        len(found) - same <= len(found) // TEXTS_A_TIE,
        f"{what} must write the same token ids, {same} of {len(found)} texts are the same",
    )
    return f"same {len(found[0])} token ids" if len(found) == 1 else f"same ids in {same} of {len(found)} texts"


def texts(made: Generated) -> list[list[int]]:
    """Token ids of each source."""
    return [line.tolist() for line in made.tokens]


def check_beam(twins: Twins, source: SourceRows, beam: int, attention: str = "sdpa") -> tuple[Agreed, Agreed]:
    """Our beam and transformers': same tokens, same scores. How often each decoder ran."""
    found = twins.our_beam(source, beam)
    calls: list[object] = []
    hook = twins.theirs(attention).model.decoder.register_forward_hook(lambda *call: calls.append(None))
    made = twins.their_beam(source, beam, attention, return_dict_in_generate=True, output_scores=True)
    hook.remove()
    what = f"transformers ({attention}) and our beam of {beam}"
    says = agree(made.sequences[:, 2:-1].tolist(), texts(found), what)
    varied = all(len(set(line)) > len(line) // 2 for line in texts(found))
    require(found.passes == twins.tokens and varied, "the texts must be long and varied")
    if beam > 1:  # greedy search has no score there
        # Each divides the sum of log-probabilities by its own count of tokens; ours leaves BOS out.
        ratio_B = made.sequences_scores.cpu() * twins.tokens / (torch.tensor(found.scores) * (twins.tokens - 1))
        off = float((ratio_B - 1).abs().median())
        require(off < ROUNDING, f"{what} must give a text the same score, they differ by {off:.1e}")
        says += " and score"
    return Agreed(found.passes, says), Agreed(len(calls), says)


def check_ct2(twins: Twins, source: SourceRows, beam: int) -> Agreed:
    """CTranslate2's beam and ours, or from a beam of 2 on transformers', which must not count the cost of an EOS."""
    if beam == 1:
        expected, of = texts(twins.our_beam(source, beam)), "ours"
    else:
        expected, of = twins.their_beam(source, beam, free_end=True)[:, 2:-1].tolist(), "transformers'"
    found = twins.ct2_words(source, beam, tokens=twins.tokens - 1)
    return Agreed(twins.tokens, f"{agree(found, expected, f'CTranslate2 and {of} beam of {beam}')} as {of}")


@torch.no_grad()
def check_query(twins: Twins, source: SourceRows, beam: int) -> Agreed:
    """JANUS left to right, and the model by its definition: one forward over the whole text has the same scores.

    Greedy search must also have taken the best token everywhere.
    """
    found = twins.our_beam(source, beam, "query")
    ids, device = twins.ids, source.tokens_R.device
    text_BN = torch.tensor(texts(found), device=device)
    target_BT = _framed(text_BN, twins)
    content_BT = pad(target_BT[:, :-1], (1, 0), value=ids.eos)
    batch, length = content_BT.shape
    positions_BT = torch.arange(length, device=device).expand(batch, -1)
    visible_BTT = torch.ones(batch, length, length, dtype=torch.bool, device=device).tril()
    query = (torch.full_like(content_BT, ids.mask), positions_BT + twins.layout.query_position_offset, visible_BTT)
    memory_BSD, real_BS = memory(twins.ours, source)
    states_BTD = reference.decode(twins.ours, (content_BT, positions_BT, visible_BTT), query, memory_BSD, real_BS)[1]
    assert states_BTD is not None
    log_p_BTV = twins.ours.logits(states_BTD[:, 1:].flatten(0, 1)).log_softmax(dim=1).view(batch, length - 1, -1)
    score_B = log_p_BTV.gather(2, target_BT[:, 1:, None]).mean(dim=(1, 2)).cpu()
    off = float((score_B / torch.tensor(found.scores) - 1).abs().max())
    require(off < ROUNDING, f"JANUS left to right must score a text as one forward does, they differ by {off:.1e}")
    if beam > 1:
        return Agreed(found.passes, "scores of one forward by the definition")
    best_BN = _likeliest(log_p_BTV[:, :-1], twins).indices
    return Agreed(found.passes, f"{agree(texts(found), best_BN.tolist(), 'JANUS and one forward')} as the definition")


@torch.no_grad()
def check_pass(twins: Twins, source: SourceRows, iterations: int) -> Agreed:
    """All at once, and a plain loop over transformers' decoder, let look in both directions: same tokens and scores."""
    found = twins.our_pass(source, iterations)
    ids, n, total = twins.ids, twins.tokens, iterations + 1
    device = source.tokens_R.device
    text_BN = torch.full((source.n_samples, n), ids.mask, device=device)
    hidden_BN, score_BN = torch.ones_like(text_BN, dtype=torch.bool), torch.zeros_like(text_BN, dtype=torch.float32)
    for done in range(1, total + 1):
        given_BT = _framed(text_BN.masked_fill(hidden_BN, ids.mask), twins)
        best = _likeliest(twins.their_look(source, given_BT).logits[:, 1:-1].log_softmax(dim=2), twins)
        text_BN = torch.where(hidden_BN, best.indices, text_BN)
        score_BN = torch.where(hidden_BN, best.values, score_BN)
        lowest_BN = score_BN.argsort(dim=1, stable=True)[:, : n * (total - done) // total]
        hidden_BN = torch.zeros_like(hidden_BN).scatter(1, lowest_BN, True)
    what = f"{total} passes and a plain loop over transformers' decoder"
    says = agree(texts(found), text_BN.tolist(), what)
    off = float((score_BN.sum(dim=1).cpu() / (n + 2) / torch.tensor(found.scores) - 1).abs().median())
    require(off < ROUNDING, f"{what} must give a text the same score, they differ by {off:.1e}")
    require(found.passes == total, f"{iterations} iterations must be {total} passes, were {found.passes}")
    return Agreed(found.passes, f"{says} as transformers' decoder without its causal mask")


def check_draft(made: Generated, greedy: Generated, right: bool) -> Agreed:
    """Drafting and greedy search: same tokens. right: no draft may be wrong, else no draft may be right.

    But for the last block of a text, which is cut, and for one block in TEXTS_A_TIE, by chance.
    """
    drafts = made.drafts
    assert drafts is not None
    says = agree(texts(made), texts(greedy), "self-drafting and greedy search")
    block, blocks = len(drafts.accepted) - 1, sum(drafts.accepted)
    off = blocks - drafts.accepted[block if right else 0] - len(made.tokens)
    require(off <= blocks // TEXTS_A_TIE, f"all drafts must be {'right' if right else 'wrong'}: {drafts.report()}")
    return Agreed(made.passes, f"{says} as greedy search; {drafts.mean:.2f} of {block} drafted accepted")


def memory(model: EncoderDecoder, source: SourceRows) -> tuple[Tensor, Tensor]:
    """memory_BSD and real_BS (bool, all True) of equally long sources, by the definition."""
    tokens_BS = source.tokens_R.view(source.n_samples, -1)
    real_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    return reference.encode(model, tokens_BS, source.positions_R.view_as(tokens_BS), real_BS), real_BS


def _likeliest(log_p_BNV: Tensor, twins: Twins) -> torch.return_types.max:
    """Values and indices [B, N] of the best token that may be written."""
    log_p_BNV = log_p_BNV.clone()
    log_p_BNV[..., twins.special] = -torch.inf
    return log_p_BNV.max(dim=2)


def _framed(text_BN: Tensor, twins: Twins) -> Tensor:
    """The text between BOS and EOS."""
    return pad(pad(text_BN, (1, 0), value=twins.ids.bos), (0, 1), value=twins.ids.eos)
