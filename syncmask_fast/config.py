"""Every setting of a run: frozen dataclasses, two presets, all checks. Imports no torch.

Ranges stand in the fields' types. Where a default comes from ALBEF, GRIT-VLP or FashionSAP, the field says so; every
other one is our choice. The SyncMask paper's own hyper-parameters are not known to us.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from syncmask_fast.data.augment import AugmentConfig
from syncmask_fast.utils.errors import UserError

Masking = Literal["sync", "random", "none"]
Batching = Literal["semi_hard", "hard", "random"]
Negatives = Literal["global", "local"]
Task = Literal["pretraining", "retrieval", "composed", "category", "subcategory"]
Inputs = Literal["image+text", "image"]


@dataclass(frozen=True)
class Range:
    """The values that a number may have, both ends included unless `above`."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """Whether the value must be more than `low`."""

    def problem(self, value: float) -> str | None:
        """Return what is wrong with a value, or None."""
        if math.isinf(self.high) and (value <= self.low if self.above else value < self.low):
            return f"must be more than {self.low:g}" if self.above else f"must be {self.low:,} or more"
        if not (self.low < value if self.above else self.low <= value) or value > self.high:
            return f"must be between {self.low:,} and {self.high:,}"
        return None


PositiveInt = Annotated[int, Range(1)]
PositiveFloat = Annotated[float, Range(0, above=True)]
Count = Annotated[int, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
# Limits far beyond use: a config that somebody shares must not build a model that takes all memory or hours.
Layers = Annotated[int, Range(1, 1000)]
Side = Annotated[int, Range(1, 16_384)]


@dataclass(frozen=True)
class ImageConfig:
    """The image encoder: any timm VisionTransformer with a class token."""

    name: str = "vit_base_patch16_224"
    """timm's name of the architecture."""
    pretrained: bool = False
    """Start from timm's weights of that name, which may also be hf-hub:OWNER/NAME or local-dir:FOLDER."""
    size: Side = 256
    """Side of the square input in pixels (ALBEF: 256)."""
    patch: Side = 16
    """Side of a patch in pixels."""
    width: PositiveInt | None = None
    """Width of the encoder; unset uses the architecture's own, as do depth and heads."""
    depth: Layers | None = None
    heads: PositiveInt | None = None
    stem: Literal["patch", "conv"] = "patch"
    """How patches are embedded. patch: timm's single projection, the only one with pretrained weights. conv: 3 x 3
    convolutions of stride 2 (Xiao et al. 2021), with which small models learn shapes much sooner."""


@dataclass(frozen=True)
class TextConfig:
    """The text encoder and the fusion encoder: one BERT, split in two (ALBEF: 6 + 6 layers)."""

    name: str | None = None
    """Hugging Face name or local folder of a BERT to start from, with its tokenizer; unset trains a tokenizer."""
    vocab_size: PositiveInt = 30_522
    """Tokens of the vocabulary (BERT's number); an upper bound if the tokenizer is trained."""
    width: PositiveInt = 768
    heads: PositiveInt = 12
    layers: Layers = 6
    """Layers of the text encoder, before the text meets the image."""
    fusion_layers: Layers = 6
    """Layers with cross-attention to the image."""
    max_length: Annotated[int, Range(3, 65_536)] = 128
    """Maximum tokens of a text, with [CLS] and [SEP]; longer texts are cut."""
    pretrain_steps: Count = 0
    """Steps of MLM on the texts alone before the training, if neither --text.name nor --weights initializes the text
    encoder (our choice). They do not count towards --steps."""


@dataclass(frozen=True)
class MaskConfig:
    """How masks are chosen. `syncmask_fast.ops.sync_mask` defines ratios and scores."""

    token_ratio: Fraction = 0.15
    """Fraction of the tokens that MLM masks (ALBEF: 0.15)."""
    patch_ratio: Fraction = 0.5
    """Fraction of the patches that MIM masks."""
    token_score: Literal["peak", "mass", "cls", "output"] = "output"
    """How a token is scored from its cross-attention."""
    patch_score: Literal["mean", "cls", "weighted", "max"] = "max"
    """How a patch is scored from the tokens' cross-attention."""
    layer: PositiveInt = 3
    """Fusion layer, from 1, whose cross-attention the teacher is read at (ALBEF's author: the third localizes best)."""
    ramp: tuple[float, float] = (0.1, 0.4)
    """The probability of sync masks rises from 0 to 1 between these two points of the training, each from 0 to 1."""


@dataclass(frozen=True)
class LossConfig:
    """The objectives with their weights (ALBEF: all 1)."""

    itc: float = 1.0
    """Weight of image-text contrast; the next ones are weights too."""
    itm: float = 1.0
    mlm: float = 1.0
    mim: float = 1.0
    presence: float = 0.0
    """Weight of the word presence loss (our choice): at the masking layer, a token's attention is to be on patches of
    images that show it, and on [CLS] in images whose text lacks it. Needs --mask.layer 1."""
    presence_negatives: PositiveInt = 8
    """Other images of the batch that the presence loss compares each text with."""
    collages: Fraction = 0.0
    """Fraction of the batch used for collages of two images, in which a token's attention is to be on its own image's
    part. Needs --loss.presence."""
    itc_only: Fraction = 0.0
    """First part of the training, from 0 to 1, without ITM, MLM and MIM."""
    negatives: Negatives = "global"
    """Where ITM negatives and the presence loss's images come from. global: the batch of all ranks, so the result does
    not depend on their number. local: the rank's own rows, with less traffic."""
    queue: Count = 65_536
    """Features of past batches that serve as ITC candidates (ALBEF: 65,536)."""
    alpha: Fraction = 0.4
    """Weight of the teacher's soft targets in ITC, reached after the first epoch (ALBEF: 0.4)."""
    temperature: PositiveFloat = 0.07
    """Initial ITC temperature; it is learned (ALBEF: 0.07, limited to 0.001 to 0.5)."""
    mim_target: Literal["pixels", "teacher"] = "pixels"
    """What masked patches are predicted as: normalized pixels, or the teacher's features of the full image."""
    mim_input: Literal["mask-tokens", "visible"] = "mask-tokens"
    """What the image encoder sees of a masked image. mask-tokens: all patches, masked ones replaced. visible: only the
    others, as in MAE (He et al. 2022), which computes less."""

    def weight(self, name: str) -> float:
        """Return the weight of a loss by its name; collages are part of the presence loss."""
        return self.presence if name == "collage" else getattr(self, name)


@dataclass(frozen=True)
class BatchingConfig:
    """How similar pairs are grouped into batches, and which ITM negatives are allowed."""

    margin: float = 0.0
    """A negative must be less similar than the true pair by more than this."""
    search_space: PositiveInt | None = None
    """Samples among which one walk of the planner searches; unset is the whole dataset (GRIT-VLP: 1,920)."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon with AdamW, with warm-up and cosine decay."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate of AdamW."""
    min_lr: float = 1e-5
    """Learning rate of the last step."""
    muon_lr: PositiveFloat | None = None
    """Peak learning rate of Muon (Jordan et al. 2024, torch.optim.Muon) for weight matrices and convolutions; AdamW
    keeps embeddings and vectors. Unset: AdamW for everything."""
    muon_weight_decay: float = 0.1
    """Weight decay of Muon (torch's default)."""
    warmup: Fraction = 0.03
    """Fraction of the training in which the learning rate rises from zero."""
    weight_decay: float = 0.02
    """Weight decay of AdamW (ALBEF: 0.02)."""
    grad_clip: PositiveFloat = 1.0
    """Maximum norm of the gradients."""
    ema_decay: Fraction = 0.995
    """Decay of the teacher (ALBEF: 0.995); at step s at most (1 + s) / (10 + s), to forget the random start."""
    grad_accum: PositiveInt = 1
    """Batches whose gradients are summed before a step."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation at the end of training."""

    holdout_fraction: Fraction = 0.05
    """Fraction of the products held out, if the data has no `eval` folder."""
    queries: PositiveInt = 1000
    """Queries of a draw of 101 candidates (FashionViL: 1,000)."""
    draws: PositiveInt = 5
    """Draws whose mean and standard deviation are reported (FashionViL: 5)."""


@dataclass(frozen=True)
class TaskConfig:
    """What a run is for. `syncmask_fast.finetune` sets it."""

    name: Task = "pretraining"
    model: Path | None = None
    """Folder of the model that fine-tuning starts from."""
    scratch: bool = False
    """Use only that model's shape and tokenizer, to measure what pretraining is worth."""
    labels: tuple[str, ...] = ()
    """Recognition: labels of the training part, in the order of the classifier's outputs."""
    inputs: Inputs = "image+text"
    """Recognition: what the classifier sees (FashionSAP and FashionViL: image and text)."""
    validation: Fraction = 0.1
    """Fraction of the training products on which the best model is chosen."""


@dataclass(frozen=True)
class TrainConfig:
    """Pretrain a fashion vision-language model with SyncMask."""

    preset: tyro.conf.Fixed[str] = "base"
    """Name of the preset that these settings started from."""
    data: str | None = None
    """Folder of shards, or one that contains `train` and `eval`, or its address (s3://, gs://, https://). Unset draws
    the lookbook."""
    weights: str | None = None
    """Initial weights of all encoders: a checkpoint in ALBEF's layout (.pth or .safetensors), with --text.name for the
    tokenizer, or the `model` folder of a run."""
    min_loaded: Fraction = 0.9
    """Minimum fraction of tensors that the initial weights must provide."""
    out: Path | None = None
    """Folder of the run. Unset is runs/PRESET-TIMESTAMP."""
    steps: PositiveInt | None = None
    """Optimizer steps. Give this or --epochs."""
    epochs: PositiveInt | None = None
    """Passes over the data. Give this or --steps."""
    seed: Count = 0
    """Seed of all random draws."""
    masking: Masking = "sync"
    """sync: masks from the teacher's cross-attention. random: random masks. none: no MLM and no MIM."""
    batching: Batching = "semi_hard"
    """semi_hard: similar pairs of other products, less similar than the true pair. hard: the most similar (GRIT-VLP).
    random: no grouping."""
    resume: str = "auto"
    """auto: resume from --out if it contains a run. never: fail if it does. Or the path of a checkpoint."""
    save_every: PositiveInt = 1000
    """Steps between checkpoints."""
    log_every: PositiveInt = 20
    """Steps between progress lines."""
    max_skipped_steps: PositiveInt = 10
    """A step whose loss or gradients are not finite changes nothing. After this many in a row the run saves the batch
    and stops."""
    batch_size: PositiveInt = 64
    """Pairs of a batch, over all processes."""
    device: str = "auto"
    """auto: CUDA if there is one, else the CPU. Or cpu, cuda, cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products; weights stay float32. auto: bfloat16 on CUDA, and on CPUs with AMX or AVX512_BF16 for
    models of width 128 or more."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the encoder blocks. auto: on CUDA."""
    grad_checkpointing: bool = False
    """Recompute encoder blocks in the backward pass. About 33 % more compute, much less memory."""
    decoder: Literal["auto", "cpp", "dali", "torchvision"] = "auto"
    """How images are decoded. cpp: our C++ operators. dali: on the GPU if there is one. torchvision: everywhere.
    auto: cpp on the CPU, dali on CUDA, else the next one that is available."""
    decode_threads: PositiveInt | None = None
    """Threads that decode images. Unset is one for each core, at most 16."""
    embed_dim: PositiveInt = 256
    """Width of the ITC space (ALBEF: 256)."""
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    batch: BatchingConfig = field(default_factory=BatchingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    task: tyro.conf.Fixed[TaskConfig] = field(default_factory=TaskConfig)

    def check(self) -> None:
        """Raise `UserError` for the first setting that cannot work."""
        for flag, value, allowed in _ranged_settings(self):
            problem = allowed.problem(value)
            if problem:
                raise UserError(f"{flag} is {value}, but {problem}.")
        self._check_training()
        self._check_encoders()
        self._check_losses()

    def _check_training(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UserError("--steps and --epochs exclude each other. Give one of them.")
        if self.batch_size == 1:
            raise UserError("--batch-size is 1, but ITC and ITM need other products in the batch. Give 2 or more.")
        low, high = self.mask.ramp
        if not 0 <= low <= high <= 1:
            raise UserError(f"--mask.ramp is {low} {high}, but must be two rising numbers between 0 and 1.")

    def _check_encoders(self) -> None:
        image, text = self.image, self.text
        if image.size % image.patch:
            raise UserError(f"--image.size {image.size} is not a multiple of --image.patch {image.patch}.")
        if image.stem == "conv" and (image.patch < 2 or image.patch & (image.patch - 1)):
            raise UserError(
                f"--image.stem conv halves the image step by step. --image.patch {image.patch} must be a power of two."
            )
        if image.stem == "conv" and image.pretrained:
            raise UserError("--image.stem conv has no pretrained weights. Drop it, or --image.pretrained.")
        if text.width % text.heads:
            raise UserError(f"--text.width {text.width} is not a multiple of --text.heads {text.heads}.")
        if self.mask.layer > text.fusion_layers:
            raise UserError(
                f"--mask.layer is {self.mask.layer}, but must be between 1 and {text.fusion_layers} "
                "(--text.fusion-layers)."
            )

    def _check_losses(self) -> None:
        loss = self.loss
        if loss.collages and not loss.presence:
            raise UserError(
                f"--loss.collages {loss.collages} is part of the presence loss. Give --loss.presence a weight too."
            )
        if loss.collages and self.image.size == self.image.patch:
            raise UserError(
                "--loss.collages combines parts of images, but the image is one patch. Give a smaller --image.patch."
            )
        # It compares texts with images that they have not been fused with, which only the first layer allows.
        if loss.presence and self.mask.layer != 1:
            raise UserError(f"--loss.presence works at --mask.layer 1 only, and that is {self.mask.layer}.")


def _ranged_settings(config: Any, prefix: str = "--") -> Iterator[tuple[str, float, Range]]:
    """Yield flag, value and range of every number that is set and has a range."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            # Flags of a task have no prefix: `syncmask_fast.finetune` offers them.
            yield from _ranged_settings(value, "--" if name == "task" else f"{flag}.")
        for annotated in (kind, *get_args(kind)):
            for allowed in getattr(annotated, "__metadata__", ()):
                if isinstance(allowed, Range) and value is not None:
                    yield flag, value, allowed


PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "tiny": (
        "What two CPU cores train in minutes.",
        TrainConfig(
            preset="tiny",
            steps=420,
            batch_size=64,
            embed_dim=128,
            image=ImageConfig(name="vit_tiny_patch16_224", size=96, patch=16, width=128, depth=4, heads=2, stem="conv"),
            text=TextConfig(
                vocab_size=2_000, width=128, heads=2, layers=2, fusion_layers=2, max_length=96, pretrain_steps=200
            ),
            augment=AugmentConfig(token_dropout=0.1),
            mask=MaskConfig(token_ratio=0.2, patch_ratio=0.1, token_score="mass", layer=1, ramp=(0.6, 0.7)),
            loss=LossConfig(itc_only=0.6, queue=0, alpha=0.0, presence=1.0, collages=0.25),
            optim=OptimConfig(lr=1e-3, min_lr=1e-5, muon_lr=0.01, ema_decay=0.99),
            save_every=200,
        ),
    ),
    "base": (
        "ALBEF-shaped: ViT-B/16 at 256 pixels, BERT 6 + 6.",
        # The FashionGen recipe; docs/recipes.md has the origin of every value.
        TrainConfig(
            preset="base",
            epochs=30,  # ALBEF, FashionSAP
            image=ImageConfig(pretrained=True),
            text=TextConfig(name="bert-base-uncased"),  # ALBEF
            augment=AugmentConfig(scale=(0.5, 1.0)),  # FashionSAP
        ),
    ),
}


def to_json(config: Any) -> dict[str, Any]:
    """Return a configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(cls: type, values: dict[str, Any]) -> Any:
    """Return the configuration of dataclass `cls` that `to_json` wrote.

    errors: UserError for a name or a value that no setting has. The file may come from anyone.
    """
    if not isinstance(values, dict):
        raise UserError(f"The configuration's {cls.__name__} is not a JSON object.")
    kinds = get_type_hints(cls)
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise UserError(f"The configuration has unknown settings: {_shown(', '.join(unknown))}.")
    return cls(**{name: _typed(kinds[name], value, name) for name, value in values.items()})


def _typed(kind: Any, value: Any, name: str) -> Any:
    """Return a JSON value converted to a setting's type. errors: UserError."""
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value)
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        fits = type(value) is str and value in parts
    elif get_origin(kind) in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        return _typed(next(part for part in parts if part is not NoneType), value, name)
    elif get_origin(kind) is tuple:
        each = parts[:1] * len(value) if isinstance(value, list) and parts[-1] is Ellipsis else parts
        if isinstance(value, list) and len(value) == len(each):
            return tuple(_typed(part, item, name) for part, item in zip(each, value, strict=True))
        fits = False
    elif kind is float:
        fits = (
            type(value) in (int, float)
            and not math.isnan(value)
            and abs(value) < 1e30
            or value in (math.inf, -math.inf)
        )
    elif kind is int:
        fits = type(value) is int and abs(value) < 2**63
    elif kind is Path:
        fits, value = isinstance(value, str) and "\0" not in value, Path(value) if isinstance(value, str) else value
    else:
        fits = type(value) is kind and (kind is not str or "\0" not in value)
    if not fits:
        raise UserError(
            f"The configuration's {name} cannot be {_shown(repr(value))}. Give a value that --help lists, or remove it."
        )
    return kind(value) if kind is float else value


def _shown(text: str) -> str:
    """Return a text of unknown origin as a short, printable part of a line."""
    return ascii(text)[1:-1][:100]
