"""Start weights: from timm, from a Hugging Face BERT, from a checkpoint in ALBEF's layout, or from a model of ours. What was loaded, missing, left
over and resized is reported, and too little is an error: a model that silently starts from nothing costs days.

Checkpoints are read as tensors alone (safetensors, or torch.load with weights_only).
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
from syncmask_fast.utils.errors import UserError

Names = dict[str, tuple[str, ...]]  # our tensor -> theirs, several behind each other
# In ALBEF's checkpoints, but not for us: the momentum copy, its queues, and what is tied to the word embeddings.
_NOT_FOR_US = (
    "visual_encoder_m.",
    "text_encoder_m.",
    "vision_proj_m.",
    "text_proj_m.",
    "image_queue",
    "text_queue",
    "queue_ptr",
    "idx_queue",
    "cls.predictions.decoder.",
    "embeddings.position_ids",
)


@dataclass
class LoadReport:
    """What became of a source of weights. Names are ours but for `unexpected`, which are the source's."""

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The part of our tensors that the source was to give and gave."""
        return len(self.loaded) / max(1, len(self.loaded) + len(self.missing))

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} of {len(self.loaded) + len(self.missing)} tensors loaded"]
        lines += [f"  resized: {name}, {how}" for name, how in self.resized.items()]
        lines += [
            f"  {what}: {_some(names)}"
            for what, names in (("missing", self.missing), ("not used", self.unexpected))
            if names
        ]
        return "\n".join(lines)


def load_initial_weights(model: SyncMaskModel) -> list[LoadReport]:
    """Fills a new model with the weights that its configuration names: `task.model`, `weights`, or else `image.pretrained` and `text.name`.

    errors: UserError where they cannot be had, do not fit, or give less than the share `min_loaded`.
    """
    config = model.config
    if config.task.model is not None:  # heads that it does not have start anew
        return [] if config.task.scratch else [load_syncmask(model, config.task.model, config.min_loaded)]
    if config.weights is not None and Path(config.weights).is_dir():
        return [load_syncmask(model, config.weights, config.min_loaded)]
    if config.weights is not None:
        return [load_albef(model, config.weights, config.min_loaded)]
    reports = []
    if config.image.pretrained:
        reports.append(load_timm(model, config.image.name, config.min_loaded))
    if config.text.name is not None:
        reports.append(load_bert(model, config.text.name, config.min_loaded))
    return reports


def load_timm(model: SyncMaskModel, name: str, least: float = 0.9) -> LoadReport:
    """Fills the image encoder from timm: a name, hf-hub:OWNER/NAME, or local-dir:FOLDER. Position embeddings are interpolated.

    errors: see `load_initial_weights`.
    """
    try:
        theirs = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # the hub, the network and timm raise many kinds
        raise UserError(
            f"--image.name {name}: timm has no weights for it here ({_one_line(error)}): name others, or local-dir:FOLDER."
        ) from error
    return _fill(model, name, theirs, {key: (key.removeprefix("image.vit."),) for key in _image_keys(model)}, least)


def load_bert(model: SyncMaskModel, name: str, least: float = 0.9) -> LoadReport:
    """Fills the text encoder and, with the layers after it, the fusion encoder from a Hugging Face BERT (name or local folder).

    Cross-attention and the heads of ITC, ITM and MIM keep their random start. errors: see `load_initial_weights`.
    """
    from transformers import BertForMaskedLM

    try:
        bert, found = BertForMaskedLM.from_pretrained(name, output_loading_info=True, weights_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--text.name {name}: no BERT can be loaded ({_one_line(error)}): give a local folder or a Hugging Face name."
        ) from error
    text, config = model.config.text, bert.config
    needed = {"width": (text.width, config.hidden_size), "heads": (text.heads, config.num_attention_heads)}
    for what, (ours, theirs) in needed.items():
        if ours != theirs:
            raise UserError(f"--text.{what} is {ours}, but {name} has {theirs}: give --text.{what} {theirs}.")
    layers = text.layers + text.fusion_layers
    if layers > config.num_hidden_layers:
        raise UserError(
            f"--text.layers and --text.fusion-layers ask for {layers} layers, but {name} has {config.num_hidden_layers}."
        )
    # What the folder lacks was filled at random by transformers: it is not what we were asked for.
    state = {
        key.removeprefix("bert."): value for key, value in bert.state_dict().items() if key not in found["missing_keys"]
    }
    return _fill(model, name, state, bert_names(text), least)


def load_albef(model: SyncMaskModel, path: str | Path, least: float = 0.9) -> LoadReport:
    """Fills every part that ALBEF has from a checkpoint in its layout (`visual_encoder.*`, `text_encoder.bert.*`), .pth or .safetensors.

    The masked patch's token and the head of MIM keep their random start. errors: see `load_initial_weights`.
    """
    state = {}
    for key, value in read_checkpoint(Path(path)).items():
        key = key.removeprefix("module.").replace("text_encoder.bert.", "text_encoder.").removeprefix("text_encoder.")
        state[key] = value
    names = {key: (key.replace("image.vit.", "visual_encoder."),) for key in _image_keys(model)}
    names |= bert_names(model.config.text) | cross_attention_names(model.config.text)
    for ours, theirs in (("image_proj", "vision_proj"), ("text_proj", "text_proj"), ("itm_head", "itm_head")):
        names |= {f"{ours}.{part}": (f"{theirs}.{part}",) for part in ("weight", "bias")}
    if "temp" in state:
        state["temp"] = state["temp"].float().clamp(0.001, 0.5).log()
    names["log_temperature"] = ("temp",)
    return _fill(model, str(path), state, names, least)


def load_syncmask(model: SyncMaskModel, folder: str | Path, least: float = 0.9) -> LoadReport:
    """Fills the model from one of ours, the `model` folder of a run. errors: see `load_initial_weights`."""
    state = SyncMaskModel.from_pretrained(folder).state_dict()
    return _fill(model, str(folder), state, {key: (key,) for key in model.state_dict()}, least)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without those of its optimiser. errors: UserError, also for one that holds more than plain data."""
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (ALBEF is published so)
    except pickle.UnpicklingError as error:
        mend = "where you trust it, save its tensors anew with torch.save(checkpoint['model'], ...)"
        raise UserError(
            f"{path} holds more than weights, and nothing else is loaded ({_one_line(error)}): {mend}."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a checkpoint that can be read ({_one_line(error)}): give a .pth or .safetensors file."
        ) from error
    for name in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    tensors = (
        {key: value for key, value in found.items() if isinstance(value, Tensor)} if isinstance(found, Mapping) else {}
    )
    if not tensors:
        raise UserError(f"{path} has no tensors, where visual_encoder.* and text_encoder.* were expected.")
    return tensors


def bert_names(config: TextConfig) -> Names:
    """Text encoder, fusion encoder without cross-attention, and MLM head by BERT's names."""
    names: Names = {
        "text.words.weight": ("embeddings.word_embeddings.weight",),
        "text.positions.weight": ("embeddings.position_embeddings.weight",),
        "text.token_type": ("embeddings.token_type_embeddings.weight",),
        "mlm_head.bias": ("cls.predictions.bias",),
    }
    modules = {
        "text.norm": ("embeddings.LayerNorm",),
        "mlm_head.dense": ("cls.predictions.transform.dense",),
        "mlm_head.norm": ("cls.predictions.transform.LayerNorm",),
    }
    for ours, theirs in _layers(config):
        modules |= _attention(f"{ours}.attention", f"{theirs}.attention", {"qkv": ("query", "key", "value")})
        modules[f"{ours}.feed_forward.up"] = (f"{theirs}.intermediate.dense",)
        modules[f"{ours}.feed_forward.down"] = (f"{theirs}.output.dense",)
        modules[f"{ours}.feed_forward.norm"] = (f"{theirs}.output.LayerNorm",)
    return names | _with_parts(modules)


def cross_attention_names(config: TextConfig) -> Names:
    """The cross-attention of the fusion layers by the names that ALBEF gives it."""
    modules: Names = {}
    for ours, theirs in _layers(config)[config.layers :]:
        modules |= _attention(f"{ours}.cross", f"{theirs}.crossattention", {"q": ("query",), "kv": ("key", "value")})
    return _with_parts(modules)


def _layers(config: TextConfig) -> list[tuple[str, str]]:
    """Our layers and BERT's: the first ones read text, those after them fuse."""
    ours = [f"text.layers.{n}" for n in range(config.layers)] + [
        f"fusion.layers.{n}" for n in range(config.fusion_layers)
    ]
    return [(name, f"encoder.layer.{n}") for n, name in enumerate(ours)]


def _attention(ours: str, theirs: str, projections: Names) -> Names:
    found: Names = {
        f"{ours}.{name}": tuple(f"{theirs}.self.{part}" for part in parts) for name, parts in projections.items()
    }
    return found | {f"{ours}.proj": (f"{theirs}.output.dense",), f"{ours}.norm": (f"{theirs}.output.LayerNorm",)}


def _with_parts(modules: Names) -> Names:
    return {
        f"{ours}.{part}": tuple(f"{name}.{part}" for name in theirs)
        for ours, theirs in modules.items()
        for part in ("weight", "bias")
    }


def _image_keys(model: SyncMaskModel) -> list[str]:
    return [name for name in model.state_dict() if name.startswith("image.vit.")]


@torch.no_grad()
def _fill(model: SyncMaskModel, source: str, state: Mapping[str, Tensor], names: Names, least: float) -> LoadReport:
    """Copies what fits, and reports it. errors: UserError where less than the share `least` of `names` was loaded."""
    report, ours, used = LoadReport(source), model.state_dict(), set()
    for name, theirs in names.items():
        if not all(key in state for key in theirs):
            report.missing.append(name)
            continue
        used.update(theirs)
        value = torch.cat([state[key] for key in theirs]) if len(theirs) > 1 else state[theirs[0]]
        fitted = _fitted(model, source, name, value.float())
        if fitted.shape != ours[name].shape:
            report.missing.append(f"{name} ({_size(ours[name])}, the source has {_size(value)})")
            continue
        if name in ("image.vit.pos_embed", "text.positions.weight") and fitted.shape != value.shape:
            report.resized[name] = f"{_size(value)} to {_size(fitted)}"
        ours[name].copy_(fitted)
        report.loaded.append(name)
    report.unexpected = [key for key in state if key not in used and not key.startswith(_NOT_FOR_US)]
    if report.share < least:
        raise UserError(
            f"{source} gives {len(report.loaded)} of the {len(names)} tensors that it was to give, less than --min-loaded {least:g} "
            f"(missing: {_some(report.missing)}; not used: {_some(report.unexpected)}): check that it fits the model, or lower --min-loaded."
        )
    return report


def _fitted(model: SyncMaskModel, source: str, name: str, value: Tensor) -> Tensor:
    """A tensor of theirs as ours, where the two are kept in another way or size."""
    text = model.config.text
    if name == "image.vit.pos_embed" and value.ndim == 3:
        vit = model.image.vit
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        side = round((value.shape[1] - prefix) ** 0.5)
        if value.shape[1] == side * side + prefix:
            return timm.layers.resample_abs_pos_embed(value, list(model.image.grid), num_prefix_tokens=prefix)
    if name == "text.positions.weight":
        if len(value) < text.max_length:
            raise UserError(f"--text.max-length is {text.max_length}, but {source} has {len(value)} positions.")
        return value[: text.max_length]
    if name == "text.words.weight" and len(value) != text.vocab_size:
        mend = "name the tokenizer that it was made with by --text.name"
        raise UserError(f"{source} has {len(value)} word pieces, but the tokenizer {text.vocab_size}: {mend}.")
    if name == "text.token_type" and value.ndim == 2:
        return value[0]
    return value


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "1"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
