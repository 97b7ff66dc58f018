"""`SyncMaskModel`: encoders, heads of the four objectives, and `encode_image`, `encode_text`, `match` for users.

Shape letters: B images, P patches, S = 1 + P, V visible patches, N texts, T tokens of all texts, C width, E width of
the ITC space.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from syncmask_fast.config import TrainConfig, from_json, to_json
from syncmask_fast.data.images import PIXEL_MEAN, PIXEL_STD
from syncmask_fast.data.tokenizer import load_tokenizer, save_tokenizer, special_ids
from syncmask_fast.model import linear
from syncmask_fast.model.encoders import (
    LAYER_NORM_EPS,
    CrossAttention,
    FeedForward,
    FusionEncoder,
    ImageEncoder,
    TextEncoder,
)
from syncmask_fast.model.layout import PackedLayout, one_to_one
from syncmask_fast.utils.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL import Image
    from tokenizers import Tokenizer


class MLMHead(nn.Module):
    """BERT's MLM head. Its output matrix is the word embedding."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        """Return logits [n, vocabulary] of fused features x [n, C] with word embeddings [vocabulary, C]."""
        # As a function, since the matrix belongs to the text encoder.
        return linear.linear(self.norm(F.gelu(self.dense(x))), word_embeddings, self.bias)


class MIMHead(nn.Module):
    """Rebuild masked patches (our choice): each attends to the full text once, then a linear layer gives its target.

    sees_visible_patches: the image encoder has not seen the masked patches (`config.loss.mim_input` "visible"). Each
    attends to the visible patches first, and to no masked one, as in CrossMAE (Fu et al. 2024).
    """

    def __init__(self, width: int, heads: int, image_width: int, target: int, sees_visible_patches: bool) -> None:
        super().__init__()
        self.in_proj = nn.Linear(image_width, width)
        if sees_visible_patches:
            self.visible_attention = CrossAttention(width, heads, image_width)
        self.text_attention = CrossAttention(width, heads, width)
        self.feed_forward = FeedForward(width)
        self.out_proj = nn.Linear(width, target)

    def forward(self, patches: Tensor, text: Tensor, layout: PackedLayout, visible: Tensor | None = None) -> Tensor:
        """Return [B, n, target] for masked patches' features [B, n, C_image] and packed text features [T, C].

        visible: features [B, 1 + V, C_image] of the visible patches; `patches` are then `mask_token_queries`.
        """
        x = self.in_proj(patches)
        if visible is not None:
            x = self.visible_attention(x, visible)
        return self.out_proj(self.feed_forward(self.text_attention(x, text, None, layout)))


class SyncMaskModel(nn.Module):
    """Image, text and fusion encoder with the heads for ITC, ITM, MLM and MIM."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        text, width, task = config.text, config.text.width, config.task

        # 1. Encoders, and the heads of ITC, ITM, MLM and MIM.
        self.image = ImageEncoder(config.image)
        self.text = TextEncoder(text)
        self.fusion = FusionEncoder(text, self.image.width)
        self.image_proj = nn.Linear(self.image.width, config.embed_dim)
        self.text_proj = nn.Linear(width, config.embed_dim)
        # As a logarithm the temperature stays positive, and its updates are relative.
        self.log_temperature = nn.Parameter(torch.tensor(config.loss.temperature).log())
        self.itm_head = nn.Linear(width, 2)
        self.mlm_head = MLMHead(width, text.vocab_size)
        target = 3 * config.image.patch**2 if config.loss.mim_target == "pixels" else self.image.width
        self.mim_head = MIMHead(width, text.heads, self.image.width, target, config.loss.mim_input == "visible")
        pretrained = list(self.children())

        # 2. The head of a fine-tuned task.
        if task.name in ("category", "subcategory"):
            self.classifier = nn.Linear(width if task.inputs == "image+text" else self.image.width, len(task.labels))
        if task.name == "composed":
            # Zero at first: a composed query starts as the sum of its image and its text.
            self.composed_proj = nn.Linear(width, config.embed_dim)
            nn.init.zeros_(self.composed_proj.weight)
            nn.init.zeros_(self.composed_proj.bias)

        # 3. Initial weights of the pretrained modules; PyTorch's own in the task's head.
        for module in pretrained:
            module.apply(_initialize)
        linear.replace_linear_layers(self)

    @property
    def mask_id(self) -> int:
        """The token id of [MASK]."""
        return special_ids(self.tokenizer).mask

    @property
    def temperature(self) -> Tensor:
        """The ITC temperature, a float32 scalar kept within 0.001 and 0.5 as in ALBEF."""
        return self.log_temperature.exp().clamp(0.001, 0.5)

    @property
    def device(self) -> torch.device:
        return self.log_temperature.device

    def project_images(self, features: Tensor) -> Tensor:
        """Return unit vectors float32 [B, E] of image features [B, S, C]."""
        # Normalized in float32: cosines in bfloat16 would have two digits.
        return F.normalize(self.image_proj(features[:, 0]).float(), dim=-1)

    def project_texts(self, features: Tensor, layout: PackedLayout) -> Tensor:
        """Return unit vectors float32 [N, E] of packed text features [T, C]."""
        return F.normalize(self.text_proj(features[layout.cu_seqlens[:-1]]).float(), dim=-1)

    def project_queries(self, images: Tensor, texts: Tensor, layout: PackedLayout) -> Tensor:
        """Return unit vectors [B, E] of composed queries.

        images: [B, S, C] features of the reference images.
        texts:  [T, C] packed features of the changes asked for.
        source: our choice; FashionSAP takes the fused [CLS] by itself.
        """
        query = self.project_images(images) + self.project_texts(texts, layout)
        if self.config.task.name == "composed":
            query = query + self.composed_proj(self._fused_cls(images, texts, layout)).float()
        return F.normalize(query, dim=-1)

    def label_logits(self, images: Tensor, texts: Tensor, layout: PackedLayout) -> Tensor:
        """Return logits float32 [B, labels] of pairs.

        They are of the fused [CLS], or of the image's where `config.task.inputs` is "image".
        """
        if self.config.task.inputs == "image":
            return self.classifier(images[:, 0]).float()
        return self.classifier(self._fused_cls(images, texts, layout)).float()

    def _fused_cls(self, images: Tensor, texts: Tensor, layout: PackedLayout) -> Tensor:
        """Return the fusion encoder's [CLS], [N, C]; text n attends to image n."""
        batch = one_to_one(layout)
        return self.fusion(texts, batch, images)[batch.cls_rows]

    # What users call --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_image(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        """Return unit vectors float32 [B, E] of PIL images, or of normalized pixels [B, 3, size, size]."""
        return self.project_images(self.image(self._pixels(images)))

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors float32 [N, E] of texts. errors: ValueError for one string, or without a tokenizer."""
        token_ids, layout = self._tokens(texts)
        return self.project_texts(self.text(token_ids, layout), layout)

    @torch.inference_mode()
    def match(self, images: Tensor | Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Return the probability, float32 [N], that image n and text n belong together (the ITM head).

        errors: ValueError where the numbers of images and texts differ, and as `encode_text`.
        """
        pixels = self._pixels(images)
        if len(pixels) != len(texts):
            raise ValueError(f"images and texts must be as many: got {len(pixels)} images and {len(texts)} texts")
        token_ids, layout = self._tokens(texts)
        fused = self._fused_cls(self.image(pixels), self.text(token_ids, layout), layout)
        return self.itm_head(fused).float().softmax(-1)[:, 1]

    def _pixels(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        """Return normalized pixels [B, 3, size, size]; the aspect ratio is not kept, as in the loader."""
        if isinstance(images, Tensor):
            return images.to(self.device)
        # Here, because training decodes with its own loader and needs no torchvision.
        from torchvision.transforms.v2 import functional as V

        size = self.config.image.size
        tensors = [V.to_image(image.convert("RGB")) for image in images]
        pixels = torch.stack([V.resize(x, [size, size], antialias=True) for x in tensors]).to(self.device).float() / 255
        return V.normalize(pixels, list(PIXEL_MEAN), list(PIXEL_STD))

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, PackedLayout]:
        """Return packed token ids int64 [T] and their layout."""
        if isinstance(texts, str):
            raise ValueError("texts must be a sequence of strings: got one string")
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: load it with SyncMaskModel.from_pretrained")
        limit = self.config.text.max_length
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        ids = [row if len(row) <= limit else [*row[: limit - 1], row[-1]] for row in ids]  # [SEP] stays the last
        layout = PackedLayout.of([len(row) for row in ids], self.device)
        return torch.tensor([i for row in ids for i in row], dtype=torch.int64, device=self.device), layout

    # Folder -----------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors, config.json and the tokenizer's files into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that are not contiguous.
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")
        # timm would fetch an hf-hub:OWNER/NAME when the model is loaded; the architecture's own name is enough.
        name = self.image.vit.pretrained_cfg.get("architecture") or self.config.image.name
        config = dataclasses.replace(self.config, image=dataclasses.replace(self.config.image, name=name))
        (folder / "config.json").write_text(json.dumps(to_json(config), indent=2) + "\n")
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> SyncMaskModel:
        """Return the model that `save_pretrained` wrote. errors: UserError where the folder does not hold one."""
        # 1. Read and check the files.
        folder = Path(folder)
        try:
            config = from_json(TrainConfig, json.loads((folder / "config.json").read_text()))
            weights = load_file(folder / "model.safetensors")
        except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
            raise UserError(
                f"{folder} is not a SyncMask model ({one_line(error)})."
                " Give a folder with config.json, model.safetensors and a tokenizer."
            ) from error
        config.check()
        name = config.image.name
        # A shared config.json must not make timm download anything.
        if ":" in name:
            raise UserError(
                f"{folder}/config.json names {name}, which would be fetched. Write the architecture's name."
            )
        tokenizer = load_tokenizer(str(folder))
        # An id beyond the embedding would fail only when a text has it.
        if max(tokenizer.get_vocab().values()) >= config.text.vocab_size:
            raise UserError(
                f"The tokenizer in {folder} has more tokens than its config.json ({config.text.vocab_size})."
                " Save the model again."
            )

        # 2. Build the model, first on the meta device: no memory is taken, however large a model config.json describes.
        try:
            with torch.device("meta"):
                shapes = {name: value.shape for name, value in cls(config).state_dict().items()}
            given = {name: value.shape for name, value in weights.items()}
            wrong = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
            if wrong:
                raise ValueError(f"{len(wrong)} tensors are missing, unknown or of another shape, such as {wrong[0]}")
            model = cls(config, tokenizer)
            model.load_state_dict(weights)
        except (RuntimeError, ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"{folder}/model.safetensors does not fit its config.json ({one_line(error)}). Save the model again."
            ) from error
        return model.to(device).eval()


def _initialize(module: nn.Module) -> None:
    """Set weights of variance 1 / inputs (LeCun et al. 1998): small models learn much sooner than with BERT's 0.02."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
