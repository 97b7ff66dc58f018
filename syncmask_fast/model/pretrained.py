"""Initial weights: from timm, from a Hugging Face BERT, from a checkpoint in ALBEF's layout, or from a model of ours.

Each source gives a `LoadReport` of what was loaded, missing, unused and resized. Too little loaded is an error:
training by mistake from random weights costs days. Checkpoints are read as tensors only (safetensors, or torch.load
with weights_only).
"""

from __future__ import annotations

import pickle  # noqa: TID251 (for the name of its error)
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from syncmask_fast.config import TextConfig
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.utils.errors import UserError, one_line

KeyMap = dict[str, tuple[str, ...]]  # our tensor or module -> theirs, to be concatenated
# Of ALBEF's checkpoints we do not need the momentum copy, its queues, and what is tied to the word embeddings.
_IGNORED = (
    "visual_encoder_m.", "text_encoder_m.", "vision_proj_m.", "text_proj_m.", "image_queue", "text_queue", "queue_ptr",
    "idx_queue", "cls.predictions.decoder.", "embeddings.position_ids",
)  # fmt: skip


@dataclass
class LoadReport:
    """The result of loading from one source. Names are ours, except for `unexpected`, which are the source's."""

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)

    @property
    def fraction_loaded(self) -> float:
        """Loaded tensors as a fraction of the expected ones."""
        return len(self.loaded) / max(1, len(self.loaded) + len(self.missing))

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} of {len(self.loaded) + len(self.missing)} tensors loaded"]
        lines += [f"  resized: {name}, {sizes}" for name, sizes in self.resized.items()]
        if self.missing:
            lines.append(f"  missing: {_some(self.missing)}")
        if self.unexpected:
            lines.append(f"  not used: {_some(self.unexpected)}")
        return "\n".join(lines)


# Sources --------------------------------------------------------------------------------------------------------------


def load_initial_weights(model: SyncMaskModel) -> list[LoadReport]:
    """Load what the configuration names: `task.model`, `weights`, or else `image.pretrained` and `text.name`.

    errors: UserError where weights cannot be read, do not fit, or give less than the fraction `min_loaded`.
    """
    config = model.config
    if config.task.model is not None:  # a head that this model lacks keeps its random weights
        return [] if config.task.scratch else [load_syncmask(model, config.task.model, config.min_loaded)]
    if config.weights is not None and Path(config.weights).is_dir():
        return [load_syncmask(model, config.weights, config.min_loaded)]
    if config.weights is not None:
        return [load_albef(model, config.weights, config.min_loaded)]
    # Otherwise each encoder has its own source, or keeps random weights.
    reports = []
    if config.image.pretrained:
        reports.append(load_timm(model, config.image.name, config.min_loaded))
    if config.text.name is not None:
        reports.append(load_bert(model, config.text.name, config.min_loaded))
    return reports


def load_timm(model: SyncMaskModel, name: str, min_loaded: float = 0.9) -> LoadReport:
    """Load the image encoder from timm: a name, hf-hub:OWNER/NAME, or local-dir:FOLDER.

    Position embeddings are interpolated to the model's grid. errors: see `load_initial_weights`.
    """
    try:
        state = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # the hub, the network and timm raise many kinds
        raise UserError(
            f"timm has no weights for --image.name {name} here ({one_line(error)})."
            " Give another name, or local-dir:FOLDER."
        ) from error
    return _fill(model, name, state, _vit_keys(model, ""), min_loaded)


def load_bert(model: SyncMaskModel, name: str, min_loaded: float = 0.9) -> LoadReport:
    """Load text and fusion encoder from the layers of a Hugging Face BERT (name or local folder).

    Cross-attention and the heads of ITC, ITM and MIM keep their random weights. errors: see `load_initial_weights`.
    """
    from transformers import BertForMaskedLM

    try:
        bert, info = BertForMaskedLM.from_pretrained(name, output_loading_info=True, weights_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--text.name {name} is no BERT that can be loaded ({one_line(error)})."
            " Give a local folder or a Hugging Face name."
        ) from error
    # Its layers must have our shape, and be enough.
    text, config = model.config.text, bert.config
    expected = {"width": (text.width, config.hidden_size), "heads": (text.heads, config.num_attention_heads)}
    for what, (ours, theirs) in expected.items():
        if ours != theirs:
            raise UserError(f"--text.{what} is {ours}, but {name} has {theirs}. Give --text.{what} {theirs}.")
    layers = text.layers + text.fusion_layers
    if layers > config.num_hidden_layers:
        raise UserError(
            f"--text.layers and --text.fusion-layers need {layers} layers, but {name} has {config.num_hidden_layers}."
            " Give fewer layers."
        )
    # transformers fills what the folder lacks at random: those tensors do not count as loaded.
    missing = info["missing_keys"]
    state = {key.removeprefix("bert."): value for key, value in bert.state_dict().items() if key not in missing}
    return _fill(model, name, state, bert_keys(text), min_loaded)


def load_albef(model: SyncMaskModel, path: str | Path, min_loaded: float = 0.9) -> LoadReport:
    """Load all modules that ALBEF has too, from a .pth or .safetensors file in its layout.

    Its keys are `visual_encoder.*`, `text_encoder.*` and so on. The mask token and the MIM head keep their random
    weights. errors: see `load_initial_weights`.
    """
    state = {}
    for key, value in read_checkpoint(Path(path)).items():
        # DDP adds `module.`. ALBEF's pretraining says `text_encoder.bert.`, its downstream tasks `text_encoder.`.
        key = key.removeprefix("module.").replace("text_encoder.bert.", "text_encoder.").removeprefix("text_encoder.")
        state[key] = value
    # ALBEF stores the temperature, we its logarithm.
    if "temp" in state:
        state["temp"] = state["temp"].float().clamp(0.001, 0.5).log()
    heads: KeyMap = {"image_proj": ("vision_proj",), "text_proj": ("text_proj",), "itm_head": ("itm_head",)}
    keys = _vit_keys(model, "visual_encoder.") | bert_keys(model.config.text)
    keys |= cross_attention_keys(model.config.text) | _weight_and_bias(heads) | {"log_temperature": ("temp",)}
    return _fill(model, str(path), state, keys, min_loaded)


def load_syncmask(model: SyncMaskModel, folder: str | Path, min_loaded: float = 0.9) -> LoadReport:
    """Load from one of our models, the `model` folder of a run. errors: see `load_initial_weights`."""
    state = SyncMaskModel.from_pretrained(folder).state_dict()
    return _fill(model, str(folder), state, {key: (key,) for key in model.state_dict()}, min_loaded)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, without the optimizer's.

    errors: UserError where the file cannot be read, or is a pickle of more than plain data.
    """
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (ALBEF is published so)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than weights, and nothing else is loaded ({one_line(error)})."
            " If you trust it, save its tensors again with torch.save(checkpoint['model'], ...)."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a checkpoint that can be read ({one_line(error)}). Give a .pth or .safetensors file."
        ) from error
    # A training checkpoint holds more than its model, under a name that depends on the trainer.
    for name in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {key: value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} has no tensors. Give a checkpoint with visual_encoder.* and text_encoder.*.")
    return tensors


# Names ----------------------------------------------------------------------------------------------------------------


def bert_keys(config: TextConfig) -> KeyMap:
    """Return BERT's names of the text encoder, of the fusion encoder without cross-attention, and of the MLM head."""
    tensors: KeyMap = {
        "text.word_embeddings.weight": ("embeddings.word_embeddings.weight",),
        "text.position_embeddings.weight": ("embeddings.position_embeddings.weight",),
        "text.token_type_embedding": ("embeddings.token_type_embeddings.weight",),
        "mlm_head.bias": ("cls.predictions.bias",),
    }
    modules: KeyMap = {
        "text.norm": ("embeddings.LayerNorm",),
        "mlm_head.dense": ("cls.predictions.transform.dense",),
        "mlm_head.norm": ("cls.predictions.transform.LayerNorm",),
    }
    for ours, theirs in _layers(config):
        modules |= _attention_keys(f"{ours}.attention", f"{theirs}.attention", {"qkv": ("query", "key", "value")})
        modules[f"{ours}.feed_forward.fc1"] = (f"{theirs}.intermediate.dense",)
        modules[f"{ours}.feed_forward.fc2"] = (f"{theirs}.output.dense",)
        modules[f"{ours}.feed_forward.norm"] = (f"{theirs}.output.LayerNorm",)
    return tensors | _weight_and_bias(modules)


def cross_attention_keys(config: TextConfig) -> KeyMap:
    """Return ALBEF's names of the fusion layers' cross-attention."""
    modules: KeyMap = {}
    for ours, theirs in _layers(config)[config.layers :]:
        projections = {"q": ("query",), "kv": ("key", "value")}
        modules |= _attention_keys(f"{ours}.cross", f"{theirs}.crossattention", projections)
    return _weight_and_bias(modules)


def _layers(config: TextConfig) -> list[tuple[str, str]]:
    """Return our layers and BERT's: its first layers encode text, those after them fuse."""
    ours = [f"text.layers.{n}" for n in range(config.layers)]
    ours += [f"fusion.layers.{n}" for n in range(config.fusion_layers)]
    return [(name, f"encoder.layer.{n}") for n, name in enumerate(ours)]


def _attention_keys(ours: str, theirs: str, projections: KeyMap) -> KeyMap:
    keys = {f"{ours}.{name}": tuple(f"{theirs}.self.{x}" for x in names) for name, names in projections.items()}
    return keys | {f"{ours}.proj": (f"{theirs}.output.dense",), f"{ours}.norm": (f"{theirs}.output.LayerNorm",)}


def _weight_and_bias(modules: KeyMap) -> KeyMap:
    """Return the tensors of modules."""
    tensors: KeyMap = {}
    for ours, theirs in modules.items():
        for tensor in ("weight", "bias"):
            tensors[f"{ours}.{tensor}"] = tuple(f"{name}.{tensor}" for name in theirs)
    return tensors


def _vit_keys(model: SyncMaskModel, prefix: str) -> KeyMap:
    """Return the image encoder's tensors by timm's names after a prefix."""
    ours = [name for name in model.state_dict() if name.startswith("image.vit.")]
    return {name: (prefix + name.removeprefix("image.vit."),) for name in ours}


# Copying --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _fill(
    model: SyncMaskModel, source: str, state: Mapping[str, Tensor], keys: KeyMap, min_loaded: float
) -> LoadReport:
    """Copy the tensors that fit, and report. errors: UserError where less than `min_loaded` of `keys` was loaded."""
    # 1. Copy tensor by tensor.
    report, ours, used = LoadReport(source), model.state_dict(), set()
    for name, theirs in keys.items():
        if not all(key in state for key in theirs):
            report.missing.append(name)
            continue
        used.update(theirs)
        # Query, key and value are three matrices in BERT, one in ours.
        value = torch.cat([state[key] for key in theirs]) if len(theirs) > 1 else state[theirs[0]]
        fitted = _fit(model, source, name, value.float())
        if fitted.shape != ours[name].shape:  # another width
            report.missing.append(f"{name} ({_size(ours[name])}, the source has {_size(value)})")
            continue
        if name in ("image.vit.pos_embed", "text.position_embeddings.weight") and fitted.shape != value.shape:
            report.resized[name] = f"{_size(value)} to {_size(fitted)}"
        ours[name].copy_(fitted)  # state_dict shares its memory with the model
        report.loaded.append(name)

    # 2. Report the rest, and refuse too little: a model that silently starts at random would only train worse.
    report.unexpected = [key for key in state if key not in used and not key.startswith(_IGNORED)]
    if report.fraction_loaded < min_loaded:
        raise UserError(
            f"{source} gives {len(report.loaded)} of {len(keys)} expected tensors,"
            f" less than --min-loaded {min_loaded:g} (missing: {_some(report.missing)};"
            f" not used: {_some(report.unexpected)}). Check that it fits the model, or lower --min-loaded."
        )
    return report


def _fit(model: SyncMaskModel, source: str, name: str, value: Tensor) -> Tensor:
    """Return a tensor of theirs in our layout and size.

    errors: UserError for too few positions, and for another vocabulary.
    """
    text = model.config.text
    if name == "image.vit.pos_embed" and value.ndim == 3:
        vit = model.image.vit
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        side = round((value.shape[1] - prefix) ** 0.5)
        # Only a square grid tells rows from columns.
        if value.shape[1] == side * side + prefix:
            return timm.layers.resample_abs_pos_embed(value, list(model.image.grid), num_prefix_tokens=prefix)
    if name == "text.position_embeddings.weight":
        if len(value) < text.max_length:
            raise UserError(
                f"--text.max-length is {text.max_length}, but {source} has {len(value)} positions. Lower it."
            )
        return value[: text.max_length]
    if name == "text.word_embeddings.weight" and len(value) != text.vocab_size:
        raise UserError(
            f"{source} has {len(value)} tokens, but the tokenizer {text.vocab_size}."
            " Give the tokenizer that it was trained with as --text.name."
        )
    # BERT has two token types; a text of ours has type 0 only.
    if name == "text.token_type_embedding" and value.ndim == 2:
        return value[0]
    return value


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "1"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:4]) or "none"
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
