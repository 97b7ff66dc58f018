"""A small BERT with weights everywhere, the reference for our text and fusion encoders."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertModel

WIDTH, HEADS, LAYERS, FUSION = 48, 4, 2, 3

LENGTHS = [7, 3, 11, 5, 13]  # odd, prime, all different


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max().item() < 1e-5


def bert(**more) -> BertModel:
    config = BertConfig(
        vocab_size=101,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=32,
        **more,
    )
    torch.manual_seed(1)
    model = BertModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():  # biases and norms too, so that none can be forgotten
        nn.init.normal_(parameter, std=0.2)
    return model
