"""The image, text and fusion encoders, on packed sequences.

The image encoder is timm's VisionTransformer. Text and fusion encoder compute what BERT does (post-norm
layers; Devlin et al. 2018). A fusion layer has cross-attention to an image between self-attention and feed-forward, as
in ALBEF (Li et al. 2021).

Shape letters: B images, P patches, S = 1 + P keys of an image ([CLS] first), V visible patches, T tokens of all texts,
C width, H heads, D = C / H.
"""

from __future__ import annotations

from collections.abc import Iterable

import timm
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from syncmask_fast.config import ImageConfig, TextConfig
from syncmask_fast.model.attention import attention
from syncmask_fast.model.layout import FusionBatch, PackedLayout, rows_multiple
from syncmask_fast.utils.errors import UserError

LAYER_NORM_EPS = 1e-12  # BERT's


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *context: object, grad_checkpointing: bool) -> Tensor:
    """Return x after all blocks, each called with the context.

    grad_checkpointing: recompute each block in the backward pass.
    """
    for block in blocks:
        if grad_checkpointing and torch.is_grad_enabled():
            # No block draws random numbers, so no generator's state needs saving.
            x = torch.utils.checkpoint.checkpoint(block, x, *context, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *context)
    return x


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Return x in the dtype of the CPU's autocast where that is on, else x."""
    # Residuals and norms then stay in that dtype: no conversion between layers. CUDA's norms are in float32 anyway.
    enabled = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return x.to(torch.get_autocast_dtype("cpu")) if enabled else x


# Image ----------------------------------------------------------------------------------------------------------------


class ImageAttention(timm.layers.Attention):
    """timm's self-attention, computed by our attention function."""

    # The parameters after x are timm's; a VisionTransformer gives neither.
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        return self.proj(attention(self.q_norm(q), self.k_norm(k), v).flatten(2))


class ImageEncoder(nn.Module):
    """A timm VisionTransformer that can hide patches.

    errors: UserError where timm has no such model, or it has no class token.
    """

    grad_checkpointing = False

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        # 1. timm's model, with our attention and the configured sizes.
        sizes = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
        sizes = {name: value for name, value in sizes.items() if value is not None}
        sizes |= {"img_size": config.size, "patch_size": config.patch}
        try:
            self.vit = timm.create_model(config.name, num_classes=0, global_pool="", attn_layer=ImageAttention, **sizes)
        except Exception as error:  # timm raises many kinds
            raise UserError(f"timm cannot create --image.name {config.name}: {error}. Give another name.") from error
        if not getattr(self.vit, "has_class_token", False):
            raise UserError(
                f"--image.name {config.name} is not a VisionTransformer with a class token."
                " Give one, such as vit_base_patch16_224."
            )

        # 2. The patch embedding, and a token in place of masked patches.
        self.conv_stem = config.stem == "conv"
        if self.conv_stem:
            self.vit.patch_embed = conv_stem(config.size, config.patch, self.vit.embed_dim)
        self.patch, self.width = config.patch, self.vit.embed_dim
        self.patches = self.vit.patch_embed.num_patches
        self.grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)
        self.mask_token = nn.Parameter(torch.zeros(self.width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, pixels: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Return features of images, followed by those of their masked copies if there is a mask.

        pixels:     [B, 3, size, size], normalized.
        patch_mask: bool [B, P], True for the patches to hide in the copies.
        returns:    [B, S, C], or [2 B, S, C] with a mask: the full images, then the masked ones, in one pass.
        """
        if patch_mask is None:
            patches = self._embed(pixels)
        else:
            patches, masked = self._embed_with_copy(pixels, patch_mask)
            masked = torch.where(patch_mask[..., None], self.mask_token.to(masked.dtype), masked)
            patches = torch.cat([patches, masked])
        return self._run(self.vit._pos_embed(patches))

    def forward_visible(self, pixels: Tensor, patch_mask: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, S, C] of images, and [B, 1 + V, C] of the visible patches of their masked copies.

        visible: int64 [B, V], the patches that patch_mask leaves. The others: see `forward`.
        """
        full, copy = (self.vit._pos_embed(x) for x in self._embed_with_copy(pixels, patch_mask))
        prefix = self.vit.num_prefix_tokens  # [CLS] and registers are always visible
        kept = copy[:, prefix:].gather(1, visible[..., None].expand(-1, -1, self.width))
        return self._run(full), self._run(torch.cat([copy[:, :prefix], kept], dim=1))

    def mask_token_queries(self, masked_index: Tensor) -> Tensor:
        """Return mask tokens [B, n, C] in the places of patches int64 [B, n]."""
        positions = F.embedding(masked_index, self.vit.pos_embed[0, -self.patches :])
        return F.layer_norm(self.mask_token + positions, (self.width,))  # the scale of this encoder's output

    def patch_mask_to_pixels(self, patch_mask: Tensor) -> Tensor:
        """Return a mask of patches, bool [B, P], as one of pixels, bool [B, 1, size, size]."""
        mask = patch_mask.view(-1, 1, *self.grid)
        return mask.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)

    def _embed_with_copy(self, pixels: Tensor, patch_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return patches [B, P, C] of images, and of copies whose visible patches show nothing of the masked ones."""
        if not self.conv_stem:
            patches = self._embed(pixels)
            return patches, patches
        # Convolutions reach beyond a patch, so the masked patches are removed from the pixels.
        return self._embed(torch.cat([pixels, pixels.masked_fill(self.patch_mask_to_pixels(patch_mask), 0)])).chunk(2)

    def _embed(self, pixels: Tensor) -> Tensor:
        # Several convolutions are about twice as fast on the channels-last format.
        return self.vit.patch_embed(pixels.contiguous(memory_format=torch.channels_last) if self.conv_stem else pixels)

    def _run(self, x: Tensor) -> Tensor:
        """Return all blocks' output for embedded tokens, without the registers."""
        vit, checkpointing = self.vit, self.grad_checkpointing
        x = vit.norm(run_blocks(vit.blocks, vit.norm_pre(to_autocast_dtype(x)), grad_checkpointing=checkpointing))
        # Registers serve the blocks only: masks and fusion see [CLS] and patches.
        registers = vit.num_prefix_tokens - 1
        return x if registers == 0 else torch.cat([x[:, :1], x[:, 1 + registers :]], dim=1)


def conv_stem(size: int, patch: int, width: int) -> nn.Module:
    """Return a patch embedding by convolutions of stride 2 ("early convolutions", Xiao et al. 2021)."""
    halvings = patch.bit_length() - 1
    # The last has `width` channels, each one before it half as many, but at least 16 (our choice).
    channels = tuple(min(width, max(16, width >> (halvings - 1 - i))) for i in range(halvings))
    backbone = ConvStem(
        depth=halvings + 1,
        channels=(*channels, width),
        kernel_size=(3,) * halvings + (1,),
        stride=(2,) * halvings + (1,),
    )
    return timm.layers.HybridEmbed(backbone, img_size=size, embed_dim=width, proj=False)


# Layers of BERT -------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """BERT's self-attention with its output projection, residual and norm. The three input projections are one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # One matmul instead of BERT's three.
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return self.norm(x + self.proj(attention(q, k, v, layout, layout).flatten(1)))


class CrossAttention(nn.Module):
    """BERT's cross-attention. Packed queries are grouped by image, so keys and values are projected once per image."""

    def __init__(self, width: int, heads: int, key_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(key_width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def project(self, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [..., H, D] of queries x [..., C], and k, v [..., H, D] of keys [..., key width]."""
        # A method of its own: masks and word presence need q and k without the attention.
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = self.kv(keys).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return q, k, v

    def forward(
        self, x: Tensor, keys: Tensor, x_layout: PackedLayout | None = None, key_layout: PackedLayout | None = None
    ) -> Tensor:
        out = attention(*self.project(x, keys), x_layout, key_layout)
        return self.norm(x + self.proj(out.flatten(-2)))


class FeedForward(nn.Module):
    """BERT's feed-forward with residual and norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.fc2(F.gelu(self.fc1(x))))


class TextLayer(nn.Module):
    """A BERT layer on packed texts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        return self.feed_forward(self.attention(x, layout))


class FusionLayer(nn.Module):
    """A BERT layer with cross-attention to an image."""

    def __init__(self, width: int, heads: int, image_width: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.cross = CrossAttention(width, heads, image_width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, batch: FusionBatch, images: Tensor) -> Tensor:
        x = self.attention(x, batch.text_layout)
        return self.feed_forward(self.cross(x, images, batch.image_layout))


# Text and fusion ------------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """BERT's embeddings and its first layers."""

    grad_checkpointing = False

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=0)  # [PAD] gets no gradient
        self.position_embeddings = nn.Embedding(config.max_length, config.width)
        self.token_type_embedding = nn.Parameter(torch.zeros(config.width))  # BERT has two; a text has type 0 only
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.layers = nn.ModuleList(TextLayer(config.width, config.heads) for _ in range(config.layers))

    def forward(self, token_ids: Tensor, layout: PackedLayout) -> Tensor:
        """Return features [T, C] of packed token ids int64 [T]."""
        # Rows are filled up to a multiple of `rows_multiple`, by sequences that nobody reads.
        total, layout = layout.total, layout.padded_to(rows_multiple(token_ids.device))
        token_ids = F.pad(token_ids, (0, layout.total - total))
        layout.materialize()
        x = self.word_embeddings(token_ids) + self.position_embeddings(layout.position_ids)
        x = to_autocast_dtype(self.norm(x + self.token_type_embedding))
        return run_blocks(self.layers, x, layout, grad_checkpointing=self.grad_checkpointing)[:total]


class FusionEncoder(nn.Module):
    """Text layers that attend to images."""

    grad_checkpointing = False

    def __init__(self, config: TextConfig, image_width: int) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.layers = nn.ModuleList(FusionLayer(width, heads, image_width) for _ in range(config.fusion_layers))

    def forward(self, x: Tensor, batch: FusionBatch, images: Tensor) -> Tensor:
        """Return fused features [total, C] of packed text features x [total, C] and image features [B, S, C_image]."""
        batch.materialize()
        return run_blocks(self.layers, x, batch, images, grad_checkpointing=self.grad_checkpointing)

    def forward_text_only(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Return features [T, C] of packed text features x [T, C], without an image and cross-attention."""
        # As a BERT reads texts: the cross-attention gets no gradient.
        layout.materialize()
        for layer in self.layers:
            x = layer.feed_forward(layer.attention(x, layout))
        return x

    def cross_attention_qkv(
        self, x: Tensor, batch: FusionBatch, images: Tensor, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [total, H, D] and k, v [B, S, H, D] of the cross-attention of fusion layer `layer` (from 1)."""
        batch.materialize()
        for earlier in self.layers[: layer - 1]:  # later layers are not computed
            x = earlier(x, batch, images)
        last = self.layers[layer - 1]
        return last.cross.project(last.attention(x, batch.text_layout), images)
