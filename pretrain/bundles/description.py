"""A bundle's `config.json`: the same model said in BART's words, and a `parlance` section for the rest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field

from pretrain.config import ModelConfig, Section, validate
from pretrain.errors import CheckpointError, ConfigError
from pretrain.models import SpecialIds
from pretrain.models.patterns import ArLayout

FORMAT: Literal[2] = 2
# ModelConfig field -> field of Hugging Face's BartConfig. Fields that both halves of BART have are written twice.
BART_NAMES = {
    "vocab_size": ("vocab_size",),
    "d_model": ("d_model",),
    "encoder_layers": ("encoder_layers",),
    "decoder_layers": ("decoder_layers",),
    "heads": ("encoder_attention_heads", "decoder_attention_heads"),
    "ffn_dim": ("encoder_ffn_dim", "decoder_ffn_dim"),
    "activation": ("activation_function",),
    "max_positions": ("max_position_embeddings",),
    "embed_scale": ("scale_embedding",),
    "dropout": ("dropout",),
    "attention_dropout": ("attention_dropout",),
    "activation_dropout": ("activation_dropout",),
    "init_std": ("init_std",),
}
Mode = Literal["ar", "nar", "causal", "hard_exit", "soft_exit"]


class ParlanceSection(Section):
    """What BART has no name for. model: the remaining ModelConfig fields. objective: options it was trained with.

    max_source, length_trained: as in `Description`.
    """

    format: Literal[2]
    architecture: Literal["EncoderDecoder"]
    model: dict[str, Any]
    objective: dict[str, Any]
    ar_layout: Literal["bos_first", "eos_first"]
    ar_query_position_offset: int = Field(ge=0, le=1)
    modes: list[Mode]
    max_source: int | None = Field(ge=3)
    length_trained: bool
    mask_token_id: int = Field(ge=0)
    unk_token_id: int = Field(ge=0)


@dataclass(frozen=True)
class Description:
    """The model of a bundle: shape, special ids, how its AR pattern is laid out, what it can do, how it was trained.

    max_source: the longest source it was trained on, in tokens with BOS and EOS; None: as many as it has positions.
    length_trained: whether its length predictor was trained, without which nothing can be written all at once.
    """

    model: ModelConfig
    ids: SpecialIds
    layout: ArLayout
    modes: tuple[Mode, ...]
    objective: dict[str, Any]
    max_source: int | None = None
    length_trained: bool = False

    @property
    def longest_source(self) -> int:
        """Tokens of a source, with BOS and EOS, beyond which it reads positions that it was not trained on."""
        return self.max_source or self.model.max_positions


def to_bart(description: Description) -> dict[str, Any]:
    """The content of config.json."""
    model, ids = description.model.model_dump(mode="json"), description.ids
    start = description.layout.start
    fields = {bart: model[ours] for ours, names in BART_NAMES.items() for bart in names}
    rest = {name: value for name, value in model.items() if name not in BART_NAMES}
    section = ParlanceSection(
        format=FORMAT,
        architecture="EncoderDecoder",
        model=rest,
        objective=description.objective,
        ar_layout=description.layout.layout,
        ar_query_position_offset=description.layout.query_position_offset,
        modes=list(description.modes),
        max_source=description.max_source,
        length_trained=description.length_trained,
        mask_token_id=ids.mask,
        unk_token_id=ids.unk,
    )
    return {
        "model_type": "bart",
        "architectures": ["BartForConditionalGeneration"],
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        **fields,
        "bos_token_id": ids.bos,
        "pad_token_id": ids.pad,
        "eos_token_id": ids.eos,
        "decoder_start_token_id": start[0],
        "parlance": section.model_dump(mode="json"),
    }


def from_bart(values: Mapping[str, Any], where: str) -> Description:
    """Reads what `to_bart` wrote; raises CheckpointError, naming the field, for anything else."""
    if values.get("model_type") != "bart" or not isinstance(values.get("parlance"), dict):
        raise CheckpointError(
            f"`{where}` must describe a Parlance bundle (`model_type` bart with a `parlance` section), "
            f"`model_type` is {values.get('model_type')!r}"
        )
    try:
        section = validate(ParlanceSection, values["parlance"], where=f"{where}: parlance")
        model = validate(ModelConfig, {**section.model, **bart_fields(values, where)}, where=where)
        special = {name: int(values[f"{name}_token_id"]) for name in ("bos", "pad", "eos")}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"`{where}` lacks or misspells {error}") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    ids = SpecialIds(**special, mask=section.mask_token_id, unk=section.unk_token_id)
    if model.vocab_size is None or max(asdict(ids).values()) >= model.vocab_size:
        raise CheckpointError(f"`{where}`: `vocab_size` must exceed every special id, got {model.vocab_size}")
    if (section.max_source or 0) > model.max_positions:
        raise CheckpointError(
            f"`{where}`: `max_source` must be at most the {model.max_positions} positions, got {section.max_source}"
        )
    layout = ArLayout(section.ar_layout, section.ar_query_position_offset, ids)
    modes = tuple(section.modes)
    return Description(model, ids, layout, modes, section.objective, section.max_source, section.length_trained)


def bart_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The ModelConfig fields among `values`, which have BART's names.

    Raises:
        KeyError: a field is missing.
        CheckpointError: the two halves of the model differ in something that is one field here.
    """
    fields = {}
    for ours, names in BART_NAMES.items():
        found = [values[name] for name in names]
        if any(value != found[0] for value in found):
            unequal = " and ".join(f"`{name}`" for name in names)
            raise CheckpointError(f"`{where}`: {unequal} must be equal, got {' and '.join(map(str, found))}")
        fields[ours] = found[0]
    return fields


def generation_config(description: Description) -> dict[str, Any]:
    """Defaults for generation in Hugging Face's field names."""
    ids, start = description.ids, description.layout.start
    forced = {"forced_bos_token_id": start[1]} if len(start) > 1 else {}
    return {
        "bos_token_id": ids.bos,
        "pad_token_id": ids.pad,
        "eos_token_id": ids.eos,
        "decoder_start_token_id": start[0],
        **forced,
        "max_length": min(description.model.length_classes, description.model.max_positions),
        "num_beams": 4,
    }
