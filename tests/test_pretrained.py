"""Start weights: loaded weights answer as their source does, and what was loaded, missing, resized and left over is
said.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from syncmask_fast.config import TextConfig, TrainConfig
from syncmask_fast.model.layout import PackedLayout, one_to_one
from syncmask_fast.model.pretrained import load_albef, load_bert, load_initial_weights, load_timm
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.utils.errors import UserError
from tests.helpers import small_config, small_tokenizer
from tests.reference_bert import HEADS, LENGTHS, WIDTH, bert, close

TEXT = TextConfig(vocab_size=101, width=WIDTH, heads=HEADS, layers=1, fusion_layers=1, max_length=20)


def config(**changes: object) -> TrainConfig:
    base = small_config()
    return dataclasses.replace(base, **{"text": TEXT, "mask": dataclasses.replace(base.mask, layer=1), **changes})


def vit(size: int = 36) -> nn.Module:
    """What the small model's image encoder is: patches of 12, width 32, two layers; at another size."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=size,
        patch_size=12,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        global_pool="",
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def albef_state() -> tuple[dict[str, torch.Tensor], nn.Module, nn.Module]:
    """A checkpoint in ALBEF's layout, and the encoders that it was made from: one text layer, then one with
    cross-attention.
    """
    torch.manual_seed(2)
    image, text = vit(48), bert(is_decoder=True, add_cross_attention=True, encoder_hidden_size=32)
    for layer in text.encoder.layer:  # transformers sizes these by the text; ALBEF by the image
        own = layer.crossattention.self
        own.key, own.value = nn.Linear(32, WIDTH), nn.Linear(32, WIDTH)
    state = {f"visual_encoder.{name}": value for name, value in image.state_dict().items()}
    for name, value in text.state_dict().items():
        if not name.startswith("encoder.layer.0.crossattention"):
            state[f"text_encoder.bert.{name}"] = value
    state |= {
        "text_encoder.bert.embeddings.position_ids": torch.arange(32)[None],
        "text_encoder.cls.predictions.bias": torch.randn(101),
    }
    for part in ("dense", "LayerNorm"):
        shape = (WIDTH, WIDTH) if part == "dense" else (WIDTH,)
        state |= {
            f"text_encoder.cls.predictions.transform.{part}.weight": torch.randn(shape),
            f"text_encoder.cls.predictions.transform.{part}.bias": torch.randn(WIDTH),
        }
    state["text_encoder.cls.predictions.decoder.weight"] = state["text_encoder.bert.embeddings.word_embeddings.weight"]
    for name, shape in (("vision_proj", (16, 32)), ("text_proj", (16, WIDTH)), ("itm_head", (2, WIDTH))):
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    state |= {
        f"{name.replace('_encoder.', '_encoder_m.')}": value for name, value in state.items() if "_encoder." in name
    }
    state |= {
        "temp": torch.tensor(0.04),
        "image_queue": torch.randn(16, 8),
        "text_queue": torch.randn(16, 8),
        "queue_ptr": torch.zeros(1),
    }
    return state, image, text


def test_bert_folder(tmp_path: Path):
    """The loaded text encoder answers as the BERT whose folder it was; the fusion layers have the BERT's later
    layers.
    """
    theirs = bert()
    theirs.save_pretrained(tmp_path)
    model = SyncMaskModel(config())
    [report] = load_initial_weights(
        SyncMaskModel(dataclasses.replace(config(), text=dataclasses.replace(TEXT, name=str(tmp_path)), min_loaded=0.5))
    )
    assert load_bert(model, str(tmp_path), 0.8).loaded == report.loaded
    assert set(report.missing) == {
        f"mlm_head.{name}" for name in ("bias", "dense.weight", "dense.bias", "norm.weight", "norm.bias")
    }
    assert report.resized == {"text.position_embeddings.weight": f"32 x {WIDTH} to 20 x {WIDTH}"}
    assert not report.unexpected
    layout = PackedLayout.of(LENGTHS)
    ids = torch.randint(1, 101, (sum(LENGTHS),))
    expected = theirs(layout.pad(ids), attention_mask=layout.valid.long(), output_hidden_states=True).hidden_states
    x = model.text(ids, layout)
    assert close(x, layout.unpad(expected[1]))
    fusion = model.fusion.layers[0]
    assert close(fusion.feed_forward(fusion.attention(x, layout)), layout.unpad(expected[2]))


def test_a_bert_that_does_not_fit(tmp_path: Path):
    bert().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"--text.width"):
        load_bert(SyncMaskModel(small_config()), str(tmp_path))
    with pytest.raises(UserError, match="no BERT that can be loaded"):
        load_bert(SyncMaskModel(config()), str(tmp_path / "nothing"))
    wrong = (
        ({"max_length": 40}, "32 positions"),
        ({"vocab_size": 90}, "101 tokens"),
        ({"fusion_layers": 5}, "need 6 layers"),
    )
    for changes, expected in wrong:
        with pytest.raises(UserError, match=expected):
            load_bert(
                SyncMaskModel(dataclasses.replace(config(), text=dataclasses.replace(TEXT, **changes))), str(tmp_path)
            )


def test_timm_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights for smaller images: position embeddings are interpolated, all else is taken over."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = vit(36)
    arguments = dict(img_size=36, patch_size=12, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    timm.models.save_for_hf(
        theirs,
        tmp_path,
        model_config={"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": arguments},
    )
    base = config()
    image = dataclasses.replace(base.image, name=f"local-dir:{tmp_path}", pretrained=True)
    model = SyncMaskModel(dataclasses.replace(base, image=image))
    [report] = load_initial_weights(model)
    assert report.fraction_loaded == 1
    assert report.resized == {"image.vit.pos_embed": "1 x 10 x 32 to 1 x 17 x 32"}
    assert "resized: image.vit.pos_embed" in str(report)
    ours = model.image.vit.state_dict()
    for name, value in theirs.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(ours[name], value)
    assert torch.equal(ours["pos_embed"][:, 0], theirs.pos_embed[:, 0])  # [CLS] has no place in the image
    with pytest.raises(UserError, match="timm has no weights"):
        load_timm(model, f"local-dir:{tmp_path}/nothing")


@pytest.mark.parametrize("kind", ["model.pth", "bare.pth", "bert.pth", "x.safetensors"])
def test_albef_checkpoint(kind: str, tmp_path: Path):
    """ALBEF's own layout, a state alone, the layout of its downstream checkpoints (no `bert.`, DDP's `module.`), and
    safetensors.
    """
    state, image, text = albef_state()
    path = tmp_path / kind
    if kind == "model.pth":
        torch.save(
            {"model": state, "optimizer": {"state": {0: {"step": 3}}}, "epoch": 3, "config": {"image_res": 48}}, path
        )
    elif kind == "bare.pth":
        torch.save(state, path)
    elif kind == "bert.pth":
        torch.save(
            {
                "model": {
                    "module." + name.replace("text_encoder.bert.", "text_encoder."): value
                    for name, value in state.items()
                }
            },
            path,
        )
    else:
        save_file({name: value.clone() for name, value in state.items()}, path)
    model = SyncMaskModel(config(weights=str(path)))
    before = model.mim_head.out_proj.weight.clone()
    [report] = load_initial_weights(model)
    assert report.fraction_loaded == 1, report
    assert report.unexpected == []  # all but the momentum copy, the queues and what is tied is used
    layout = PackedLayout.of(LENGTHS)
    ids, pixels = torch.randint(1, 101, (sum(LENGTHS),)), torch.randn(len(LENGTHS), 3, 48, 48)
    features = model.eval().image(pixels)
    assert close(features, image(pixels))
    hidden, mask = text.embeddings(layout.pad(ids)), layout.valid[:, None, None, :]
    x = model.text(ids, layout)
    first = text.encoder.layer[0]
    attended = first.attention(hidden, mask)[0]
    hidden = first.feed_forward_chunk(attended)
    assert close(x, layout.unpad(hidden))
    hidden = text.encoder.layer[1](hidden, mask, features, None)
    assert close(model.fusion(x, one_to_one(layout), features), layout.unpad(hidden))
    assert model.temperature.item() == pytest.approx(0.04)
    assert torch.equal(model.itm_head.weight, state["itm_head.weight"])
    assert torch.equal(model.mlm_head.dense.weight, state["text_encoder.cls.predictions.transform.dense.weight"])
    assert torch.equal(model.mim_head.out_proj.weight, before)


def test_a_model_of_ours(tmp_path: Path):
    """Another seed's model, for images of another size and shorter texts."""
    torch.manual_seed(1)
    tokenizer = small_tokenizer()
    base = config(weights=str(tmp_path), text=dataclasses.replace(TEXT, vocab_size=tokenizer.get_vocab_size()))
    saved = SyncMaskModel(base, tokenizer)
    saved.save_pretrained(tmp_path)
    changed = dataclasses.replace(
        base, image=dataclasses.replace(base.image, size=36), text=dataclasses.replace(base.text, max_length=10)
    )
    model = SyncMaskModel(changed)
    [report] = load_initial_weights(model)
    assert report.fraction_loaded == 1, report
    assert set(report.resized) == {"image.vit.pos_embed", "text.position_embeddings.weight"}
    for name, value in model.state_dict().items():
        if name not in report.resized:
            assert torch.equal(value, saved.state_dict()[name]), name
    assert torch.equal(model.text.position_embeddings.weight, saved.text.position_embeddings.weight[:10])
    with pytest.raises(UserError, match="not a SyncMask model"):
        load_initial_weights(SyncMaskModel(config(weights=str(tmp_path.parent))))


def test_too_little_is_an_error_unless_asked_for(tmp_path: Path):
    state = {name: value for name, value in albef_state()[0].items() if not name.startswith("visual_encoder.")} | {
        "extra": torch.zeros(1)
    }
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=r"less than --min-loaded 0.9 \(missing: image.vit.cls_token, .* more; not used: extra\)"
    ):
        load_initial_weights(SyncMaskModel(config(weights=str(tmp_path / "x.pth"))))
    [report] = load_initial_weights(SyncMaskModel(config(weights=str(tmp_path / "x.pth"), min_loaded=0.4)))
    assert report.unexpected == ["extra"]
    assert all(name.startswith("image.vit.") for name in report.missing)
    assert "not used: extra" in str(report)


def test_no_code_is_run(tmp_path: Path):
    """A pickle that would make a folder when it is loaded."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": {"x": torch.zeros(1)}, "more": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="holds more than weights"):
        load_albef(SyncMaskModel(config()), tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100)])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_no_checkpoint(content: bytes, name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_albef(SyncMaskModel(config()), tmp_path / name)
    with pytest.raises(UserError, match="nowhere"):
        load_albef(SyncMaskModel(config()), tmp_path / "nowhere.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="has no tensors"):
        load_albef(SyncMaskModel(config()), tmp_path / "list.pth")
