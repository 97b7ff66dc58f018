"""Start weights for the text and the fusion encoder from a BERT (ALBEF: its first layers read text, its last ones fuse)."""

from __future__ import annotations

import torch
from torch import nn

from syncmask_fast.errors import UserError
from syncmask_fast.model import SyncMaskModel


@torch.no_grad()
def load_bert(model: SyncMaskModel, name: str) -> str:
    """Copies a Hugging Face BERT (name or local folder) into the text encoder and, layer by layer after it, the fusion encoder.

    Cross-attention and heads keep their random start. Returns one sentence that says what was loaded.
    errors: UserError where the BERT cannot be had, or has another width or too few layers, words or positions.
    """
    from transformers import BertModel

    try:
        bert = BertModel.from_pretrained(name, add_pooling_layer=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--text.name {name}: no BERT can be loaded ({reason}): give a local folder or a Hugging Face name.") from error
    text, config = model.config.text, bert.config
    needed = {"width": (text.width, config.hidden_size), "heads": (text.heads, config.num_attention_heads)}
    for what, (ours, theirs) in needed.items():
        if ours != theirs:
            raise UserError(f"--text.{what} is {ours}, but {name} has {theirs}: give --text.{what} {theirs}.")
    layers = text.layers + text.fusion_layers
    if layers > config.num_hidden_layers:
        raise UserError(f"--text.layers and --text.fusion-layers ask for {layers} layers, but {name} has {config.num_hidden_layers}.")
    if text.max_tokens > config.max_position_embeddings:
        raise UserError(f"--text.max-tokens is {text.max_tokens}, but {name} has {config.max_position_embeddings} positions.")
    if text.vocabulary != config.vocab_size:
        raise UserError(f"{name} has {config.vocab_size} word pieces, but its tokenizer {text.vocabulary}: give one whose files belong together.")

    theirs = bert.embeddings
    model.text.words.weight.copy_(theirs.word_embeddings.weight)
    model.text.positions.weight.copy_(theirs.position_embeddings.weight[: text.max_tokens])
    model.text.token_type.copy_(theirs.token_type_embeddings.weight[0])
    _copy(model.text.norm, theirs.LayerNorm)
    for ours, layer in zip((*model.text.layers, *model.fusion.layers), bert.encoder.layer, strict=False):
        attention = layer.attention
        _copy(ours.attention.qkv, attention.self.query, attention.self.key, attention.self.value)
        _copy(ours.attention.proj, attention.output.dense)
        _copy(ours.attention.norm, attention.output.LayerNorm)
        _copy(ours.feed_forward.up, layer.intermediate.dense)
        _copy(ours.feed_forward.down, layer.output.dense)
        _copy(ours.feed_forward.norm, layer.output.LayerNorm)
    return f"{name}: embeddings, {text.layers} text layers and {text.fusion_layers} fusion layers loaded; cross-attention and heads start at random"


def _copy(ours: nn.Module, *theirs: nn.Module) -> None:
    """Weights and biases of one module, or of several behind each other."""
    for part in ("weight", "bias"):
        getattr(ours, part).copy_(torch.cat([getattr(module, part) for module in theirs]))
