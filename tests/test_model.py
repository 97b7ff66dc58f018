"""Our encoders against the libraries whose weights they take, and packed sequences against one by one.

All in float32, to 1e-5.
"""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from syncmask_fast.config import ImageConfig, TextConfig
from syncmask_fast.model.attention import attention, block_diagonal_mask
from syncmask_fast.model.encoders import FusionEncoder, ImageEncoder, TextEncoder
from syncmask_fast.model.layout import PackedLayout, group_by_image, one_to_one
from syncmask_fast.model.syncmask_model import SyncMaskModel
from tests.helpers import small_config, small_tokenizer
from tests.reference_bert import FUSION, HEADS, LAYERS, LENGTHS, WIDTH, bert, close


def copy_linear(ours: nn.Linear, *theirs: nn.Linear) -> None:
    ours.weight.data = torch.cat([x.weight for x in theirs]).detach().clone()
    ours.bias.data = torch.cat([x.bias for x in theirs]).detach().clone()


def copy_block(ours: nn.Module, theirs: nn.Module) -> None:
    """Self-attention, feed-forward and, where there is one, cross-attention of one BERT layer."""
    own = theirs.attention.self
    copy_linear(ours.attention.qkv, own.query, own.key, own.value)
    copy_linear(ours.attention.proj, theirs.attention.output.dense)
    ours.attention.norm.load_state_dict(theirs.attention.output.LayerNorm.state_dict())
    copy_linear(ours.feed_forward.fc1, theirs.intermediate.dense)
    copy_linear(ours.feed_forward.fc2, theirs.output.dense)
    ours.feed_forward.norm.load_state_dict(theirs.output.LayerNorm.state_dict())
    if hasattr(theirs, "crossattention"):
        cross = theirs.crossattention.self
        copy_linear(ours.cross.q, cross.query)
        copy_linear(ours.cross.kv, cross.key, cross.value)
        copy_linear(ours.cross.proj, theirs.crossattention.output.dense)
        ours.cross.norm.load_state_dict(theirs.crossattention.output.LayerNorm.state_dict())


def test_image_encoder_equals_timm():
    torch.manual_seed(0)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=12, depth=3, num_classes=0, global_pool=""
    )
    ours = ImageEncoder(ImageConfig(name="vit_tiny_patch16_224", size=48, patch=12, depth=3))
    weights = {f"vit.{name}": torch.randn_like(value) * 0.1 for name, value in theirs.state_dict().items()}
    theirs.load_state_dict({name.removeprefix("vit."): value for name, value in weights.items()})
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert missing == ["mask_token"]
    assert not unexpected
    pixels = torch.randn(3, 3, 48, 48)
    assert close(ours.eval()(pixels), theirs.eval()(pixels))


@pytest.mark.parametrize(("patch", "stem"), [(12, "patch"), (8, "conv"), (16, "conv")])
def test_masked_copy_hides_its_patches_and_leaves_the_full_image(patch: int, stem: str):
    torch.manual_seed(0)
    encoder = ImageEncoder(ImageConfig(name="vit_tiny_patch16_224", size=48, patch=patch, depth=2, stem=stem)).eval()
    nn.init.normal_(encoder.mask_token)
    grid = 48 // patch
    pixels, mask = torch.randn(2, 3, 48, 48), torch.zeros(2, grid * grid, dtype=torch.bool)
    mask[:, grid + 1] = True  # the second of the second row
    full, masked = encoder(pixels, mask).chunk(2)
    assert close(full, encoder(pixels))
    changed = pixels.clone()
    changed[:, :, patch : 2 * patch, patch : 2 * patch] += 1
    assert close(encoder(changed, mask).chunk(2)[1], masked)
    assert not close(encoder(changed, mask).chunk(2)[0], full)
    changed = pixels.clone()
    changed[:, :, :patch, patch : 2 * patch] += 1  # the one above it
    assert not close(encoder(changed, mask).chunk(2)[1], masked)


@pytest.mark.parametrize(("patch", "stem"), [(12, "patch"), (8, "conv"), (16, "conv")])
def test_visible_copy_knows_nothing_of_dropped_patches(patch: int, stem: str):
    torch.manual_seed(0)
    encoder = ImageEncoder(ImageConfig(name="vit_tiny_patch16_224", size=48, patch=patch, depth=2, stem=stem)).eval()
    grid = 48 // patch
    pixels, mask = torch.randn(2, 3, 48, 48), torch.zeros(2, grid * grid, dtype=torch.bool)
    mask[:, grid + 1] = True
    others = torch.tensor([[n for n in range(grid * grid) if n != grid + 1]] * 2)
    full, copy = encoder.forward_visible(pixels, mask, others)
    assert copy.shape[1] == grid * grid
    assert close(full, encoder(pixels))
    changed = pixels.clone()
    changed[:, :, patch : 2 * patch, patch : 2 * patch] += 1
    assert close(encoder.forward_visible(changed, mask, others)[1], copy)
    changed = pixels.clone()
    changed[:, :, :patch, patch : 2 * patch] += 1
    assert not close(encoder.forward_visible(changed, mask, others)[1], copy)


def test_visible_patches_keep_their_positions():
    torch.manual_seed(0)
    encoder = ImageEncoder(ImageConfig(name="vit_tiny_patch16_224", size=48, patch=12, depth=2)).eval()
    nn.init.normal_(encoder.vit.pos_embed)
    pixels, order = torch.randn(2, 3, 48, 48), torch.stack([torch.randperm(16), torch.randperm(16)])
    full, copy = encoder.forward_visible(pixels, torch.zeros(2, 16, dtype=torch.bool), order)
    assert close(copy[:, :1], full[:, :1])
    assert close(copy[:, 1:], torch.stack([x[1 + places] for x, places in zip(full, order, strict=True)]))
    queries = encoder.mask_token_queries(order)
    expected = torch.stack([encoder.mask_token + encoder.vit.pos_embed[0, 1 + places] for places in order])
    assert torch.allclose(
        queries, (expected - expected.mean(-1, keepdim=True)) / expected.std(-1, correction=0, keepdim=True), atol=1e-4
    )


def test_text_encoder_equals_bert():
    theirs = bert()
    ours = TextEncoder(TextConfig(vocab_size=101, width=WIDTH, heads=HEADS, layers=LAYERS, max_length=32))
    ours.word_embeddings.weight.data = theirs.embeddings.word_embeddings.weight.detach().clone()
    ours.position_embeddings.weight.data = theirs.embeddings.position_embeddings.weight.detach().clone()
    ours.token_type_embedding.data = theirs.embeddings.token_type_embeddings.weight[0].detach().clone()
    ours.norm.load_state_dict(theirs.embeddings.LayerNorm.state_dict())
    for mine, layer in zip(ours.layers, theirs.encoder.layer, strict=True):
        copy_block(mine, layer)
    layout = PackedLayout.of(LENGTHS)
    ids = torch.randint(1, 101, (sum(LENGTHS),))
    expected = theirs(layout.pad(ids), attention_mask=layout.valid.long()).last_hidden_state
    assert close(ours(ids, layout), layout.unpad(expected))


def test_fusion_encoder_equals_bert_with_cross_attention():
    theirs = bert(is_decoder=True, add_cross_attention=True)
    theirs.config.is_decoder = False  # cross-attention, but no causal mask
    for layer in theirs.encoder.layer:
        layer.attention.self.is_causal = False
    ours = FusionEncoder(TextConfig(width=WIDTH, heads=HEADS, fusion_layers=LAYERS), WIDTH)
    for mine, layer in zip(ours.layers, theirs.encoder.layer, strict=True):
        copy_block(mine, layer)
    layout, images = PackedLayout.of(LENGTHS), torch.randn(len(LENGTHS), 10, WIDTH)
    x = torch.randn(sum(LENGTHS), WIDTH)
    hidden, mask = layout.pad(x), layout.valid[:, None, None, :]
    for layer in theirs.encoder.layer:
        hidden = layer(hidden, mask, images, None)
    assert close(ours(x, one_to_one(layout), images), layout.unpad(hidden))


def test_packed_fusion_equals_one_by_one():
    """Several texts at one image, an image without any, one text twice: as if each pair stood alone."""
    torch.manual_seed(2)
    fusion = FusionEncoder(TextConfig(width=WIDTH, heads=HEADS, fusion_layers=FUSION), WIDTH).eval()
    source, n_images = PackedLayout.of(LENGTHS), 4
    x, images = torch.randn(source.total, WIDTH), torch.randn(n_images, 6, WIDTH)
    sequences, looks_at = torch.tensor([4, 0, 1, 1, 3, 2, 0]), torch.tensor([3, 0, 0, 3, 1, 0, 3])
    each = list(zip(sequences.tolist(), looks_at.tolist(), strict=True))
    for capacity in (None, 100):  # exactly, and with rows reserved as on CUDA
        pack = group_by_image(source, sequences, looks_at, n_images, capacity)
        fused = fusion(x[pack.source_rows], pack, images)
        for place, (text, image) in enumerate(each):
            rows = slice(int(source.cu_seqlens[text]), int(source.cu_seqlens[text + 1]))
            alone = fusion(x[rows], one_to_one(PackedLayout.of([LENGTHS[text]])), images[image : image + 1])
            first = int(pack.cls_rows[place])
            assert close(fused[first : first + LENGTHS[text]], alone)


def test_attention_between_blocks_is_impossible():
    """The mask that CUDA takes allows just what the CPU path computes."""
    q_layout, k_layout = PackedLayout.of([3, 1, 5]), PackedLayout.of([2, 7, 4])
    torch.manual_seed(3)
    q, k, v = torch.randn(9, 2, 16), torch.randn(13, 2, 16), torch.randn(13, 2, 16)
    allowed = torch.zeros(9, 13, dtype=torch.bool)
    for n in range(3):
        allowed[
            q_layout.cu_seqlens[n] : q_layout.cu_seqlens[n + 1], k_layout.cu_seqlens[n] : k_layout.cu_seqlens[n + 1]
        ] = True
    logits = torch.einsum("qhd,khd->hqk", q, k).double() / 4
    expected = torch.einsum("hqk,khd->qhd", logits.masked_fill(~allowed, -torch.inf).softmax(-1), v.double())
    assert close(attention(q, k, v, q_layout, k_layout), expected.float())
    mask = block_diagonal_mask(3, q_layout, k_layout)
    assert mask.q_seqinfo.seqstart.tolist() == [0, 3, 4, 9]
    assert mask.k_seqinfo.seqstart.tolist() == [0, 2, 9, 13]
    dense = block_diagonal_mask(3, q_layout, 4)
    assert dense.k_seqinfo.seqstart.tolist() == [0, 4, 8, 12]


def test_saved_model_answers_as_before(tmp_path):
    torch.manual_seed(4)
    model = SyncMaskModel(small_config(), small_tokenizer()).eval()
    model.save_pretrained(tmp_path / "model")
    again = SyncMaskModel.from_pretrained(tmp_path / "model")
    images = [Image.new("RGB", (40, 60), color) for color in ("red", "navy", "green")]
    texts = ["a red dress", "a navy coat with a star", "green"]
    assert torch.equal(model.encode_image(images), again.encode_image(images))
    assert torch.equal(model.encode_text(texts), again.encode_text(texts))
    match = again.match(images, texts)
    assert match.shape == (3,)
    assert ((match > 0) & (match < 1)).all()
    # Each answer is that of its pair alone, so that a batch mixes nothing up.
    for n in range(3):
        assert close(again.match(images[n : n + 1], texts[n : n + 1]), match[n : n + 1])
        assert close(again.encode_text(texts[n : n + 1]), again.encode_text(texts)[n : n + 1])
    norms = again.encode_image(images).norm(dim=-1)
    assert close(norms, torch.ones(3))
