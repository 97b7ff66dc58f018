"""`SyncMaskModel`: the encoders, the heads of the four objectives, and what users call: `encode_image`, `encode_text`, `match`.

Shape letters as in `encoders`: B images, P patches, S = 1 + P, T tokens of all texts, C width, E width of the ITC space.
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
from syncmask_fast.data.loader import PIXEL_MEAN
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
from syncmask_fast.utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from tokenizers import Tokenizer


class MLMHead(nn.Module):
    """BERT's MLM head; its output matrix is the word embedding."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Logits [n, vocabulary] of fused features x [n, C] with word embeddings [vocabulary, C]."""
        return linear.linear(self.norm(F.gelu(self.dense(x))), words, self.bias)


class MIMHead(nn.Module):
    """Rebuilds masked patches (our choice): each looks at the full text once, then a linear layer gives its target.

    looks: the image encoder has not seen them (`config.loss.mim_input` "visible"); each looks at the visible patches first, and at no masked one, as
    in CrossMAE (Fu et al. 2024).
    """

    def __init__(self, width: int, heads: int, image_width: int, target: int, looks: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(image_width, width)
        if looks:
            self.look = CrossAttention(width, heads, image_width)
        self.cross = CrossAttention(width, heads, width)
        self.feed_forward = FeedForward(width)
        self.leave = nn.Linear(width, target)

    def forward(self, patches: Tensor, text: Tensor, layout: PackedLayout, visible: Tensor | None = None) -> Tensor:
        """[B, n, target] from masked patches' features [B, n, C_image] and packed text features [T, C].

        visible: [B, 1 + V, C_image], features of the visible patches; `patches` are then `ImageEncoder.mask_token_queries`.
        """
        x = self.enter(patches)
        if visible is not None:
            x = self.look(x, visible)
        return self.leave(self.feed_forward(self.cross(x, text, None, layout)))


class SyncMaskModel(nn.Module):
    """Image, text and fusion encoder with the heads for ITC, ITM, MLM and MIM."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        text, width = config.text, config.text.width
        self.image = ImageEncoder(config.image)
        self.text = TextEncoder(text)
        self.fusion = FusionEncoder(text, self.image.width)
        self.image_proj = nn.Linear(self.image.width, config.embed_dim)
        self.text_proj = nn.Linear(width, config.embed_dim)
        self.log_temperature = nn.Parameter(torch.tensor(config.loss.temperature).log())
        self.itm_head = nn.Linear(width, 2)
        self.mlm_head = MLMHead(width, text.vocab_size)
        target = 3 * config.image.patch**2 if config.loss.mim_target == "pixels" else self.image.width
        self.mim_head = MIMHead(width, text.heads, self.image.width, target, looks=config.loss.mim_input == "visible")
        task = config.task
        if task.name in ("category", "subcategory"):
            self.classifier = nn.Linear(width if task.inputs == "image+text" else self.image.width, len(task.labels))
        if task.name == "composed":
            self.composed_proj = nn.Linear(width, config.embed_dim)  # starts at zero: as the sum of image and text
            nn.init.zeros_(self.composed_proj.weight)
            nn.init.zeros_(self.composed_proj.bias)
        for part in (
            self.image,
            self.text,
            self.fusion,
            self.image_proj,
            self.text_proj,
            self.itm_head,
            self.mlm_head,
            self.mim_head,
        ):
            part.apply(_init_scratch)
        linear.replace_linear_layers(self)

    @property
    def mask_id(self) -> int:
        """The token id of [MASK]."""
        return special_ids(self.tokenizer).mask

    @property
    def temperature(self) -> Tensor:
        """The ITC temperature, kept within 0.001 and 0.5 as in ALBEF."""
        return self.log_temperature.exp().clamp(0.001, 0.5)

    @property
    def device(self) -> torch.device:
        return self.log_temperature.device

    def project_images(self, features: Tensor) -> Tensor:
        """Unit vectors [B, E] of image features [B, S, C]."""
        return F.normalize(self.image_proj(features[:, 0]).float(), dim=-1)

    def project_texts(self, features: Tensor, layout: PackedLayout) -> Tensor:
        """Unit vectors [N, E] of packed text features [T, C]."""
        return F.normalize(self.text_proj(features[layout.cu_seqlens[:-1]]).float(), dim=-1)

    def project_queries(self, images: Tensor, texts: Tensor, layout: PackedLayout) -> Tensor:
        """Unit vectors [B, E] of composed queries: reference images' features [B, S, C] with packed features [T, C] of what is to change.

        The sum of both unit vectors and, once fine-tuned, a projection of the fused [CLS] (our choice; FashionSAP takes the fused [CLS] alone).
        """
        query = self.project_images(images) + self.project_texts(texts, layout)
        if self.config.task.name == "composed":
            pack = one_to_one(layout)
            query = query + self.composed_proj(self.fusion(texts, pack, images)[pack.cls_rows]).float()
        return F.normalize(query, dim=-1)

    def label_logits(self, images: Tensor, texts: Tensor, layout: PackedLayout) -> Tensor:
        """Logits float32 [B, labels] of pairs, from the fused [CLS], or from the image's [CLS] where `config.task.inputs` is "image"."""
        if self.config.task.inputs == "image":
            return self.classifier(images[:, 0]).float()
        pack = one_to_one(layout)
        return self.classifier(self.fusion(texts, pack, images)[pack.cls_rows]).float()

    # What users call ------------------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_image(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        """Unit vectors float32 [B, E] of PIL images, or of normalised pixels [B, 3, size, size]."""
        return self.project_images(self.image(self._pixels(images)))

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 [N, E] of texts."""
        token_ids, layout = self._tokens(texts)
        return self.project_texts(self.text(token_ids, layout), layout)

    @torch.inference_mode()
    def match(self, images: Tensor | Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """The chance, float32 [N], that image n and text n belong together (the ITM head)."""
        pixels = self._pixels(images)
        if len(pixels) != len(texts):
            raise ValueError(f"images and texts must be as many: got {len(pixels)} images and {len(texts)} texts")
        token_ids, layout = self._tokens(texts)
        pack = one_to_one(layout)
        fused = self.fusion(self.text(token_ids, layout), pack, self.image(pixels))
        return self.itm_head(fused[pack.cls_rows]).float().softmax(-1)[:, 1]

    def _pixels(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        if isinstance(images, Tensor):
            return images.to(self.device)
        from torchvision.transforms.v2 import functional as V

        size = self.config.image.size
        tensors = [V.to_image(image.convert("RGB")) for image in images]
        pixels = torch.stack([V.resize(x, [size, size], antialias=True) for x in tensors]).to(self.device).float() / 255
        return V.normalize(pixels, list(PIXEL_MEAN), list(PIXEL_MEAN))

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, PackedLayout]:
        if isinstance(texts, str):
            raise ValueError("texts must be a sequence of strings: got one string")
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: load it with SyncMaskModel.from_pretrained")
        limit = self.config.text.max_length
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        ids = [row if len(row) <= limit else [*row[: limit - 1], row[-1]] for row in ids]
        layout = PackedLayout.of([len(row) for row in ids], self.device)
        return torch.tensor([i for row in ids for i in row], dtype=torch.int64, device=self.device), layout

    # Folder ---------------------------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors, config.json and the tokenizer's files into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")
        # timm would fetch what hf-hub:OWNER/NAME says; the architecture's own name says as much
        image = dataclasses.replace(
            self.config.image, name=self.image.vit.pretrained_cfg.get("architecture") or self.config.image.name
        )
        (folder / "config.json").write_text(
            json.dumps(to_json(dataclasses.replace(self.config, image=image)), indent=2) + "\n"
        )
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> SyncMaskModel:
        """The model that `save_pretrained` wrote; raises `UserError` where the folder does not hold one."""
        folder = Path(folder)
        try:
            config = from_json(TrainConfig, json.loads((folder / "config.json").read_text()))
            weights = load_file(folder / "model.safetensors")
        except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
            raise UserError(
                f"{folder} is not a SyncMask model (config.json, model.safetensors and a tokenizer): {_one_line(error)}"
            ) from error
        config.check()
        if ":" in config.image.name:
            raise UserError(
                f"{folder}/config.json names {config.image.name}, which would be fetched: write the architecture's own name there."
            )
        tokenizer = load_tokenizer(str(folder))
        if max(tokenizer.get_vocab().values()) >= config.text.vocab_size:
            raise UserError(
                f"the tokenizer in {folder} has more word pieces than its config.json ({config.text.vocab_size}): save the model anew."
            )
        try:
            with torch.device("meta"):  # takes no memory, however large a model config.json asks for
                asked = {name: value.shape for name, value in cls(config).state_dict().items()}
            wrong = sorted(
                name
                for name in asked.keys() | weights.keys()
                if name not in weights or weights[name].shape != asked.get(name)
            )
            if wrong:
                raise ValueError(f"{len(wrong)} tensors are missing, unknown or of another shape, such as {wrong[0]}")
            model = cls(config, tokenizer)
            model.load_state_dict(weights)
        except (RuntimeError, ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{folder}/model.safetensors does not fit its config.json: {_one_line(error)}") from error
        return model.to(device).eval()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _init_scratch(module: nn.Module) -> None:
    """Weights with variance 1 / inputs (LeCun et al. 1998): small models learn much sooner than from BERT's 0.02."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
