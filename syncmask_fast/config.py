"""Every setting of a run: frozen dataclasses, two presets, all checks. Imports no torch.

Where a value is the parents' (ALBEF, GRIT-VLP, FashionSAP) the comment says so; everything else is our choice. The SyncMask paper's own
hyper-parameters are not known to us, so none of these is presented as the paper's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from syncmask_fast.data.augment import AugmentConfig
from syncmask_fast.utils.errors import UserError

Masking = Literal["sync", "random", "none"]
Batching = Literal["semi_hard", "hard", "random"]
Negatives = Literal["global", "local"]
Task = Literal["pretraining", "retrieval", "composed", "category", "subcategory"]
Inputs = Literal["image+text", "image"]


@dataclass(frozen=True)
class ImageConfig:
    """The image encoder: any timm VisionTransformer with a class token."""

    name: str = "vit_base_patch16_224"
    """timm's name of the architecture."""
    pretrained: bool = False
    """Start from timm's weights of that name, which may be hf-hub:OWNER/NAME or local-dir:FOLDER too."""
    size: int = 256
    """Side of the square input in pixels (ALBEF: 256)."""
    patch: int = 16
    """Side of a patch in pixels."""
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    """Width, depth and heads; unset takes the architecture's own."""
    stem: Literal["patch", "conv"] = "patch"
    """How patches are embedded. patch: timm's one projection, the only one with weights to start from; conv: 3 x 3 convolutions of stride 2
    (Xiao et al. 2021), from which small models see shapes much sooner."""


@dataclass(frozen=True)
class TextConfig:
    """The text encoder and the fusion encoder: one BERT, cut in two (ALBEF: 6 + 6 layers)."""

    name: str | None = None
    """Hugging Face name or local folder of a BERT to start from, with its tokenizer; unset trains a tokenizer on the corpus."""
    vocab_size: int = 30_522
    """Word pieces (BERT's count); with a tokenizer of our own an upper bound."""
    width: int = 768
    heads: int = 12
    layers: int = 6
    """Layers before the text meets the image."""
    fusion_layers: int = 6
    """Layers with cross-attention to the image."""
    max_length: int = 128
    """Texts are cut to this many word pieces, [CLS] and [SEP] included."""
    pretrain_steps: int = 0
    """Where neither --text.name nor --weights gives the text encoder a start: steps of MLM on the texts alone before the training, which stand for
    what a BERT has learnt (our choice). They are not counted in --steps."""


@dataclass(frozen=True)
class MaskConfig:
    """How masks are chosen. Scores and ratios are those of `syncmask_fast.ops.sync_mask`."""

    token_ratio: float = 0.15
    """Share of the words that is masked for MLM (ALBEF: 0.15)."""
    patch_ratio: float = 0.5
    """Share of the patches that is masked for MIM."""
    token_score: Literal["peak", "mass", "cls", "output"] = "output"
    patch_score: Literal["mean", "cls", "weighted", "max"] = "max"
    layer: int = 3
    """Fusion layer, counted from 1, whose cross-attention the teacher reads (ALBEF's author finds the third to localise best)."""
    ramp: tuple[float, float] = (0.1, 0.4)
    """Parts of the training between which a sample's chance of a sync mask instead of a random one goes from 0 to 1."""


@dataclass(frozen=True)
class LossConfig:
    """The four objectives, added up with these weights (the parents: a plain sum)."""

    itc: float = 1.0
    itm: float = 1.0
    mlm: float = 1.0
    mim: float = 1.0
    presence: float = 0.0
    """Weight of the word presence loss (our choice): the attention of a word at the masking layer is to lie on the patches of images that show
    it, and on [CLS] where the image belongs to a text without this word. Needs --mask.layer 1."""
    presence_negatives: int = 8
    """Other images of the batch that each text is compared with for it."""
    collages: float = 0.0
    """Collages for the presence loss, as a share of the batch: of two images cut into one, a word must look at the part that is from its own."""
    itc_only: float = 0.0
    """First part of the training, 0 to 1, without ITM, MLM and MIM: image and text are aligned before they are fused."""
    negatives: Negatives = "global"
    """Where a rank's ITM negatives, and the images that the presence loss compares with, are from. global: the batch of all ranks, so that any number
    of ranks computes the same; local: the rank's own part of it, which needs less traffic."""
    queue: int = 65_536
    """Momentum features kept as further ITC candidates (ALBEF: 65,536)."""
    alpha: float = 0.4
    """Share of the teacher's soft targets in ITC (ALBEF: 0.4), reached after the first epoch."""
    temperature: float = 0.07
    """Start of the learnt ITC temperature (ALBEF: 0.07, kept within 0.001 and 0.5)."""
    mim_target: Literal["pixels", "teacher"] = "pixels"
    """What masked patches are rebuilt to: their pixels, normalised per patch, or the teacher's features of the full image."""
    mim_input: Literal["replace", "visible"] = "replace"
    """What the image encoder sees of the masked copy. replace: all patches, mask tokens for the masked ones; visible: the others alone, as in MAE
    (He et al. 2022), which is less work, and the MIM head puts mask tokens with their positions in their place."""


@dataclass(frozen=True)
class BatchingConfig:
    """Grouping of similar pairs into batches, and the draw of ITM negatives."""

    margin: float = 0.0
    """A negative must be less similar than the true pair by more than this."""
    search_space: int | None = None
    """Samples that one walk of the planner sees; unset is the whole dataset (GRIT-VLP: 1,920)."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon beside it, with warm-up and cosine decay."""

    lr: float = 1e-4
    min_lr: float = 1e-5
    muon_lr: float | None = None
    """Learning rate of Muon (Jordan et al. 2024, torch.optim.Muon) for weight matrices and convolutions; AdamW keeps embeddings and vectors.
    It falls in step with `lr`. Unset: AdamW for everything."""
    muon_weight_decay: float = 0.1
    """Weight decay of Muon (torch's default)."""
    warmup: float = 0.03
    """Part of the training over which the learning rate rises from zero."""
    weight_decay: float = 0.02
    grad_clip: float = 1.0
    """Largest gradient norm."""
    ema_decay: float = 0.995
    """Momentum of the teacher (ALBEF: 0.995); at step s never more than (1 + s) / (10 + s), so that it leaves its random start soon."""
    grad_accum: int = 1
    """Batches whose gradients are added up before a step."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation at the end of training."""

    holdout_fraction: float = 0.05
    """Share of the products held out where the data has no `eval` folder."""
    queries: int = 1000
    """Queries of a 101-candidate draw (FashionViL: 1,000)."""
    draws: int = 5
    """Draws whose mean and standard deviation are reported (FashionViL: 5)."""


@dataclass(frozen=True)
class TaskConfig:
    """What a run is for. `syncmask_fast.finetune` fills it in; pretraining leaves it as it is."""

    name: Task = "pretraining"
    model: Path | None = None
    """Folder of the model that the fine-tuning starts from."""
    scratch: bool = False
    """Take that model's shape and tokenizer only: what pretraining is worth is the difference."""
    labels: tuple[str, ...] = ()
    """Recognition: the labels of the training part, in the order of the classifier's outputs."""
    inputs: Inputs = "image+text"
    """Recognition: what the classifier sees. The parents feed image and text."""
    validation: float = 0.1
    """Share of the training products on which the best model is chosen."""


@dataclass(frozen=True)
class TrainConfig:
    """Pretrains a fashion vision-language model with SyncMask."""

    preset: str = "base"
    """Name of the preset that these settings started from."""
    data: str | None = None
    """Folder of shards, or one with `train` and `eval` inside, or its address (s3://, gs://, https://); unset draws the lookbook."""
    weights: str | None = None
    """What to start all encoders from: a checkpoint in ALBEF's layout (.pth or .safetensors), for which --text.name then gives the tokenizer
    alone, or the `model` folder of a run, which has its own."""
    min_loaded: float = 0.9
    """Least part of the tensors of a model that weights to start from must give; less is an error."""
    out: Path | None = None
    """Folder of the run; unset is runs/PRESET-TIMESTAMP."""
    steps: int | None = None
    """Optimiser steps; give this or --epochs."""
    epochs: int | None = None
    """Passes over the data; give this or --steps."""
    seed: int = 0
    masking: Masking = "sync"
    """sync: what the teacher's cross-attention chooses; random: as before SyncMask; none: no MLM and no MIM."""
    batching: Batching = "semi_hard"
    """semi_hard: similar, never the same product, less similar than the true pair; hard: the most similar (GRIT-VLP's walk); random."""
    resume: str = "auto"
    """auto: go on where --out stopped; never: refuse to; or the path of a checkpoint to go on from."""
    save_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 20
    """Steps between progress lines."""
    max_skipped_steps: int = 10
    """A step whose loss or gradients are not finite changes nothing; after this many in a row the run stops and saves the batch."""
    batch_size: int = 64
    """Pairs of a step, of all processes together."""
    device: str = "auto"
    """auto: the first CUDA device, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of products; weights stay in float32. auto: bfloat16 on CUDA, and on CPUs with AMX or AVX512_BF16 for models of width 128 and more."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the encoders' blocks. auto: on CUDA."""
    grad_checkpointing: bool = False
    """Compute what is inside the encoders' blocks anew in the backward pass instead of keeping it: about a third more work, far less memory."""
    decoder: Literal["auto", "cpp", "dali", "torchvision"] = "auto"
    """What makes pixels of images. native: compiled; dali: decodes on the GPU where there is one; torchvision: runs everywhere.
    auto: native on the CPU, dali on CUDA, and the next of these where that cannot run."""
    decode_threads: int | None = None
    """Threads that decode images; unset is one for each core, at most 16."""
    embed_dim: int = 256
    """Width of the space that ITC compares in (ALBEF: 256)."""
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
        """Raises `UserError` for the first setting that cannot work."""
        if self.steps is not None and self.epochs is not None:
            raise UserError("--steps and --epochs were both given: give one of them.")
        positive = {
            "--steps": self.steps,
            "--epochs": self.epochs,
            "--save-every": self.save_every,
            "--log-every": self.log_every,
            "--batch-size": self.batch_size,
            "--embed-dim": self.embed_dim,
            "--decode-threads": self.decode_threads,
            "--image.size": self.image.size,
            "--image.patch": self.image.patch,
            "--image.width": self.image.width,
            "--image.depth": self.image.depth,
            "--image.heads": self.image.heads,
            "--text.vocab-size": self.text.vocab_size,
            "--text.width": self.text.width,
            "--max-skipped-steps": self.max_skipped_steps,
            "--text.heads": self.text.heads,
            "--optim.muon-lr": self.optim.muon_lr,
            "--loss.presence-negatives": self.loss.presence_negatives,
            "--text.layers": self.text.layers,
            "--text.fusion-layers": self.text.fusion_layers,
            "--loss.temperature": self.loss.temperature,
            "--optim.lr": self.optim.lr,
            "--optim.grad-clip": self.optim.grad_clip,
            "--optim.grad-accum": self.optim.grad_accum,
            "--eval.queries": self.eval.queries,
            "--eval.draws": self.eval.draws,
            "--batch.search-space": self.batch.search_space,
        }
        for flag, value in positive.items():
            if value is not None and not value > 0:
                raise UserError(f"{flag} is {value}, but must be more than 0.")
        limits = {  # far beyond use, so that no file that somebody shares can make a model that takes the machine's memory or hours to build
            "--text.layers": (self.text.layers, 1000),
            "--text.fusion-layers": (self.text.fusion_layers, 1000),
            "--image.depth": (self.image.depth, 1000),
            "--image.size": (self.image.size, 16_384),
            "--text.max-length": (self.text.max_length, 65_536),
        }
        for flag, (value, limit) in limits.items():
            if value is not None and value > limit:
                raise UserError(f"{flag} is {value}, but must be at most {limit:,}.")
        shares = {
            "--mask.token-ratio": self.mask.token_ratio,
            "--mask.patch-ratio": self.mask.patch_ratio,
            "--loss.alpha": self.loss.alpha,
            "--loss.itc-only": self.loss.itc_only,
            "--loss.collages": self.loss.collages,
            "--optim.warmup": self.optim.warmup,
            "--min-loaded": self.min_loaded,
            "--optim.ema-decay": self.optim.ema_decay,
            "--eval.holdout-fraction": self.eval.holdout_fraction,
            "--validation": self.task.validation,
        }
        for flag, value in shares.items():
            if not 0 <= value <= 1:
                raise UserError(f"{flag} is {value}, but must lie within 0 and 1.")
        if self.batch_size == 1:
            raise UserError("--batch-size is 1, but ITC and ITM need other products in the batch: give 2 or more.")
        if self.image.size % self.image.patch:
            raise UserError(f"--image.size {self.image.size} is not a multiple of --image.patch {self.image.patch}.")
        if self.image.stem == "conv" and (self.image.patch < 2 or self.image.patch & (self.image.patch - 1)):
            raise UserError(
                f"--image.stem conv halves the image step by step: --image.patch {self.image.patch} must be a power of two."
            )
        if self.image.stem == "conv" and self.image.pretrained:
            raise UserError("--image.stem conv has no weights to start from: drop it, or --image.pretrained.")
        if self.loss.collages and not self.loss.presence:
            raise UserError(
                f"--loss.collages {self.loss.collages} is a part of the presence loss: give --loss.presence a weight too."
            )
        if self.loss.collages and self.image.size == self.image.patch:
            raise UserError(
                "--loss.collages puts parts of images together, but the image is one patch: give a smaller --image.patch."
            )
        if self.loss.presence and self.mask.layer != 1:
            raise UserError(
                f"--loss.presence compares texts with other images, which is done in --mask.layer 1 alone: got {self.mask.layer}."
            )
        if self.text.width % self.text.heads:
            raise UserError(f"--text.width {self.text.width} is not a multiple of --text.heads {self.text.heads}.")
        if not 1 <= self.mask.layer <= self.text.fusion_layers:
            raise UserError(
                f"--mask.layer is {self.mask.layer}, but must lie within 1 and {self.text.fusion_layers} (--text.fusion-layers)."
            )
        if self.text.max_length < 3:
            raise UserError(
                f"--text.max-length is {self.text.max_length}, but must be 3 or more: [CLS], a word, [SEP]."
            )
        if self.loss.queue < 0:
            raise UserError(f"--loss.queue is {self.loss.queue}, but must be 0 or more.")
        if self.text.pretrain_steps < 0:
            raise UserError(f"--text.pretrain-steps is {self.text.pretrain_steps}, but must be 0 or more.")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}, but must be 0 or more.")
        low, high = self.mask.ramp
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"--mask.ramp is {low} {high}, but must be two rising parts of the training within 0 and 1."
            )


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
    """A configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(cls: type, values: dict[str, Any]) -> Any:
    """The configuration of dataclass `cls` that `to_json` wrote; raises `UserError` for a name or a value that no setting has, whoever wrote it."""
    if not isinstance(values, dict):
        raise UserError(f"The configuration's {cls.__name__} is not a table of settings.")
    kinds = get_type_hints(cls)
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise UserError(
            f"The configuration has settings that this version does not know: {_shown(', '.join(unknown))}."
        )
    return cls(**{name: _typed(kinds[name], value, name) for name, value in values.items()})


def _typed(kind: Any, value: Any, name: str) -> Any:
    """A value of JSON as a setting's type says. errors: UserError."""
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
            f"The configuration's {name} cannot be {_shown(repr(value))}: give what --help says, or take it out."
        )
    return kind(value) if kind is float else value


def _shown(text: str) -> str:
    """A text of unknown origin as a short part of one line."""
    return ascii(text)[1:-1][:100]
