"""Fine-tuning from end to end on drawn images: every task, resuming, user errors, and search."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from syncmask_fast import evaluate, finetune, search
from syncmask_fast.config import TaskConfig
from syncmask_fast.data.shard_writer import ShardSetWriter
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.splits import open_splits, split_validation
from syncmask_fast.data.tokenizer import train_tokenizer
from syncmask_fast.model.pretrained import load_initial_weights
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.tasks.retrieval import search_products
from syncmask_fast.utils.errors import UserError
from tests.helpers import learned, small_config

FOUR = [
    "--steps",
    "4",
    "--batch-size",
    "8",
    "--save-every",
    "2",
    "--log-every",
    "2",
    "--decode-threads",
    "1",
    "--device",
    "cpu",
    "--validation",
    "0.3",
]


@pytest.fixture(scope="module")
def start(lookbook: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model, saved."""
    base = small_config()
    tokenizer = train_tokenizer(ShardIndex.open(lookbook / "train").texts, base.text.vocab_size)
    text = type(base.text)(**{**vars(base.text), "vocab_size": tokenizer.get_vocab_size(), "max_length": 64})
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start") / "model"
    SyncMaskModel(small_config(text=text, decode_threads=1), tokenizer).save_pretrained(folder)
    return folder


def tune(task: str, start: Path, lookbook: Path, out: Path, *more: str) -> dict[str, float]:
    finetune.main([task, "--model", str(start), "--data", str(lookbook), "--out", str(out), *FOUR, *more])
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(
    ("task", "more", "metric"),
    [
        ("retrieval", [], "retrieval/mean/101-candidate/R@1"),
        ("composed", [], "composed/original/mean/R@10"),
        ("category", ["--inputs", "image", "--scratch"], "category/image/accuracy"),
        ("subcategory", [], "subcategory/image+text/accuracy"),
    ],
)
def test_every_task(task: str, more: list[str], metric: str, start: Path, lookbook: Path, tmp_path: Path):
    """Train, keep the best by validation, evaluate. A resumed run has the same results, and so has `evaluate`."""
    out = tmp_path / "run"
    results = tune(task, start, lookbook, out, *more)
    assert 0 <= results[metric] <= 100
    found = learned(out)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    validated = [row for row in found if any(name.startswith("validation/") for name in row)]
    assert [row["step"] for row in validated] == [2, 4]
    best = json.loads((out / "best.json").read_text())
    assert best["value"] == pytest.approx(max(row[f"validation/{best['metric']}"] for row in validated), abs=1e-3)

    again = tmp_path / "again"
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    if best["step"] == 4:
        shutil.rmtree(again / "model")
        (again / "best.json").unlink()
    assert tune(task, start, lookbook, again, *more) == pytest.approx(results)
    assert learned(again) == found

    evaluate.main(
        [
            task,
            "--model",
            str(out / "model"),
            "--data",
            str(lookbook),
            "--out",
            str(tmp_path / "results.json"),
            "--device",
            "cpu",
        ]
    )
    same = json.loads((tmp_path / "results.json").read_text())
    assert {name: same[name] for name in results} == pytest.approx(results)


def test_split_validation(lookbook: Path):
    whole, _ = open_splits(lookbook)
    left, held = split_validation(whole, 0.3)
    ids = whole.index.product_ids
    assert len(left) + len(held) == len(whole)
    assert not set(ids[left.samples]) & set(ids[held.samples])
    assert len(set(ids[held.samples])) == round(0.3 * len(set(ids)))


def test_initial_weights(start: Path):
    """The model's weights are loaded; the task's head keeps its random ones."""
    theirs = SyncMaskModel.from_pretrained(start)
    config = small_config(text=theirs.config.text, task=TaskConfig("category", start, labels=("bag", "hat")))
    torch.manual_seed(5)
    model = SyncMaskModel(config, theirs.tokenizer)
    head = model.classifier.weight.clone()
    load_initial_weights(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert torch.equal(model.classifier.weight, head)


def test_recipes(start: Path, capsys: pytest.CaptureFixture[str]):
    settings = finetune.Composed(start, lr=0.1)
    parents = finetune.configure("composed", settings, small_config(preset="base"))
    said = capsys.readouterr().out
    assert "epochs 20 (FashionSAP)" in said
    assert "lr 0.1 (given)" in said
    assert (parents.epochs, parents.batch_size, parents.optim.weight_decay, parents.optim.lr) == (20, 32, 0.2, 0.1)
    tiny = finetune.configure("composed", finetune.Composed(start), small_config())
    assert tiny.optim.muon_lr == finetune.TINY["muon_lr"][0]
    for recipe in finetune.RECIPES.values():
        assert all(origin for _, origin in recipe.values())


def test_user_errors(start: Path, lookbook: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no-model"):
        tune("retrieval", tmp_path / "no-model", lookbook, tmp_path / "run")
    with pytest.raises(UserError, match="--validation 0.0"):
        tune("retrieval", start, lookbook, tmp_path / "run", "--validation", "0")
    with pytest.raises(UserError, match="--batch-size"):
        tune("retrieval", start, lookbook, tmp_path / "run", "--batch-size", "1")
    with pytest.raises(UserError, match="finetune category"):
        evaluate.main(["category", "--model", str(start), "--data", str(lookbook), "--device", "cpu"])
    index = ShardIndex.open(lookbook / "eval")
    with ShardSetWriter(tmp_path / "plain") as writer:
        for i in range(40):
            writer.write(f"{i:04d}", index.image_bytes(i), {"text": index.texts[i]})
    with pytest.raises(UserError, match=r"triplets\.json"):
        tune("composed", start, tmp_path / "plain", tmp_path / "run")
    with pytest.raises(UserError, match="labels"):
        tune("category", start, tmp_path / "plain", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_search(start: Path, lookbook: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Different products, best first, with the scores of the model's public calls; an image of them."""
    model = SyncMaskModel.from_pretrained(start)
    split = open_splits(lookbook)[1]
    found = search_products(model, split, "a red dress", 5)
    ids = [split.index.product_ids[match.sample_id] for match in found]
    assert len(set(ids)) == 5
    assert [match.score for match in found] == sorted((match.score for match in found), reverse=True)
    out = tmp_path / "found" / "top.png"
    search.main(
        [
            "a red dress",
            "--model",
            str(start),
            "--data",
            str(lookbook),
            "--out",
            str(out),
            "--top",
            "3",
            "--rerank",
            "20",
            "--device",
            "cpu",
        ]
    )
    assert capsys.readouterr().out.count("product ") == 3
    assert out.stat().st_size > 10_000
    for flags, named in ((["", "--top", "1"], "query"), (["red", "--top", "0"], "--top")):
        with pytest.raises(UserError, match=named):
            search.main([*flags, "--model", str(start), "--data", str(lookbook)])
