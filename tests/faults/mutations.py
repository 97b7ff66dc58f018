"""Files that others may have written, changed at random, and the outcome of each: read, repaired or refused."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import numpy as np
import torch

from syncmask_fast.config import to_json
from syncmask_fast.data.augment import AugmentConfig, sample_augmentations
from syncmask_fast.data.decode.backends import make_decoder, why_unavailable
from syncmask_fast.data.decode.base import DecodeRequest
from syncmask_fast.data.images import check_image, decode_image
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.splits import Split
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.data.triplets import open_triplets
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.tasks.mask_quality import mask_truth
from syncmask_fast.training.checkpoint import TrainState, load_latest, save_checkpoint
from syncmask_fast.training.log import MetricsLog
from syncmask_fast.utils.errors import UserError
from tests.helpers import encoded_image, small_config, small_tokenizer

READ, REPAIRED, REFUSED = "read", "repaired", "refused"
Edit = tuple[str, float, bytes]
"""What is done to bytes: "flip", "insert", "delete", "cut", "zero" or "repeat", where (0 to 1), and with which
bytes.
"""
KINDS_OF_EDIT = ("flip", "insert", "delete", "cut", "zero", "repeat")
HOSTILE = (
    b"\xff" * 8,
    b"\0" * 8,
    b"-1",
    b"99999999999999999999",
    b"1e999",
    b"NaN",
    b"null",
    b"[[[[",
    b'{"',
    b"../../../x",
    b"/etc/passwd",
    b"\x80",
)
HOSTILE_VALUES = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
    "../../x",
    "\ud800",
    "\0",
    [],
    {},
    [[]],
    [None],
    {"": ""},
    [1, 2, 3],
    "hf-hub:nobody/nothing",
    "local-dir:/etc",
)


def random_edits(draw: random.Random) -> list[Edit]:
    def one() -> Edit:
        return (
            draw.choice(KINDS_OF_EDIT),
            draw.random(),
            draw.choice([*HOSTILE, draw.randbytes(draw.choice((1, 1, 4, 40)))]),
        )

    return [one() for _ in range(draw.choice((1, 1, 1, 2, 5)))]


def edited(data: bytes, edits: list[Edit]) -> bytes:
    for kind, where, value in edits:
        at = int(where * len(data))
        end = at + len(value)
        if kind == "flip":
            data = data[:at] + bytes(a ^ (b or 1) for a, b in zip(data[at:end], value, strict=False)) + data[end:]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "delete":
            data = data[:at] + data[end:]
        elif kind == "cut":
            data = data[:at]
        elif kind == "zero":
            data = data[:at] + bytes(min(512, len(data) - at)) + data[at + 512 :]
        else:
            data = data[:at] + data[at:end] * 20 + data[end:]
    return data


def edited_json(value: object, draw: random.Random) -> object:
    """The value with one place of it, at any depth, changed to something hostile, removed or added to."""
    places: list[tuple[object, object]] = []

    def visit(node: object) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, inner in items:
            places.append((node, key))
            visit(inner)

    value = json.loads(json.dumps(value))
    visit(value)
    if not places or draw.random() < 0.05:
        return draw.choice(HOSTILE_VALUES)
    node, key = draw.choice(places)
    what = draw.random()
    if what < 0.7:
        node[key] = draw.choice(HOSTILE_VALUES)
    elif what < 0.85 or isinstance(node, list):
        del node[key]
    else:
        node[draw.choice(["", "x", "..", "a" * 300])] = draw.choice(HOSTILE_VALUES)
    return value


def as_json(value: object) -> bytes:
    return json.dumps(value, allow_nan=True).encode("utf-8", "surrogatepass")


class Kind:
    """One kind of input: `mutant(draw)` is the changed file's bytes; `outcome(bytes)` feeds them and says what became
    of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def mutant(self, draw: random.Random) -> bytes:
        return edited(self.whole, random_edits(draw))

    whole: bytes
    outcome: Callable[[bytes], str]


RECORD = {
    "product_id": 7,
    "text": "a red dress with a zip",
    "category": "dress",
    "subcategory": "maxi",
    "view": "front",
    "attributes": [{"span": [2, 5], "box": [0, 0, 10, 10]}, {"span": [19, 22], "box": None}],
}


def shard(records: list[bytes], images: list[bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number, (record, image) in enumerate(zip(records, images, strict=True)):
            for name, data in ((f"s{number}.jpg", image), (f"s{number}.json", record)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def use_index(folder: Path) -> ShardIndex:
    """Reads all that training and evaluation read of a folder of shards."""
    index = ShardIndex.open(folder, max_bad=0.9)
    tokens = TokenCache.open(folder, small_tokenizer(), index.texts, 24)
    tokens.pack(np.arange(len(index)))
    for i in range(len(index)):
        record = index.record(i)
        index.key(i), index.shard_path(i)
        data = index.image_bytes(i)
        try:
            width, height = check_image(data)
        except ValueError:
            continue
        mask_truth(tokens.spans(i), record.get("attributes") or [], width, height, 4)
    return index


class Tar(Kind):
    """A shard's bytes: headers, names, sizes, members."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.whole = shard([as_json(RECORD)] * 4, [encoded_image(seed, 40, 30) for seed in range(4)])

    def outcome(self, data: bytes) -> str:
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        (self.folder / "0.tar").write_bytes(data)
        index = use_index(self.folder)
        return REPAIRED if index.warnings else READ


class JsonMember(Tar):
    """The record of one sample of four."""

    def mutant(self, draw: random.Random) -> bytes:
        record = (
            as_json(edited_json(RECORD, draw)) if draw.random() < 0.7 else edited(as_json(RECORD), random_edits(draw))
        )
        return shard([record, *[as_json(RECORD)] * 3], [encoded_image(seed, 40, 30) for seed in range(4)])


class EncodedImage(Kind):
    """An encoded image, in each of the formats, through the checks and the decoder of training."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        kinds = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})]
        self.images = [encoded_image(0, 40, 30, kind=kind, **options) for kind, options in kinds]
        backend = "torchvision" if why_unavailable("cpp") else "cpp"
        self.decoder = make_decoder(backend, batch_size=1, size=16, threads=1)

    def mutant(self, draw: random.Random) -> bytes:
        return edited(draw.choice(self.images), random_edits(draw))

    def outcome(self, data: bytes) -> str:
        try:
            width, height = check_image(data)
        except ValueError:
            return "left out, with the reason"
        place = np.zeros(1, np.int64)
        self.decoder.submit(
            DecodeRequest(
                place,
                place,
                [data],
                sample_augmentations(0, 0, place, np.array([width]), np.array([height]), AugmentConfig()),
                0,
            )
        )
        _, pixels, failed = self.decoder.result()
        assert failed or (pixels.shape == (1, 3, 16, 16) and pixels.isfinite().all())
        if failed:
            return "left out, with the reason"
        decode_image(data)
        return READ


class IndexCache(Kind):
    """The index of shards that a data folder may bring along."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "0.tar").write_bytes(shard([as_json(RECORD)] * 4, [encoded_image(seed, 40, 30) for seed in range(4)]))
        index = use_index(folder)
        self.cache = folder / ".syncmask-index.npz"
        self.whole, self.mark = self.cache.read_bytes(), index.fingerprint()

    def outcome(self, data: bytes) -> str:
        self.cache.write_bytes(data)
        index = use_index(self.folder)
        assert index.fingerprint() == self.mark, "a damaged index was believed"
        return REPAIRED if self.cache.read_bytes() != data else READ


class IndexArrays(IndexCache):
    """The same, written by somebody who knows the format: whole files whose arrays are hostile."""

    def mutant(self, draw: random.Random) -> bytes:
        with np.load(io.BytesIO(self.whole)) as file:
            arrays = {name: file[name].copy() for name in file.files}
        name = draw.choice([name for name in arrays if name != "meta"])
        change = draw.randrange(5)
        if change == 0:
            arrays[name] = arrays[name][: draw.randrange(len(arrays[name]) + 1)]
        elif change == 1:
            arrays[name] = arrays[name].astype(draw.choice(["float64", "uint8", "complex64", "U4", "bool"]))
        elif change == 2:
            arrays[name] = arrays[name][None]
        else:
            arrays[name].flat[draw.randrange(arrays[name].size)] = draw.choice([-1, 200, 127, 2**31 - 1]) % (
                256 if arrays[name].dtype == np.uint8 else 2**31
            )
        out = io.BytesIO()
        (np.savez_compressed if draw.random() < 0.2 else np.savez)(out, **arrays)
        return out.getvalue()

    def outcome(self, data: bytes) -> str:
        self.cache.write_bytes(data)
        use_index(self.folder)
        return REPAIRED if self.cache.read_bytes() != data else "accepted: it fits the shards"


class Tokens(Kind):
    """The token ids of a dataset, three files in one folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.texts = ["a red dress", "a navy coat with a zip", "the green bag"]
        self.known = TokenCache.open(folder, small_tokenizer(), self.texts, 24).pack(np.arange(3))
        (self.place,) = folder.glob(".tokens-*")
        self.files = {path.name: path.read_bytes() for path in sorted(self.place.iterdir())}

    def mutant(self, draw: random.Random) -> bytes:
        name = draw.choice(list(self.files))
        return name.encode() + b"\n" + edited(self.files[name], random_edits(draw))

    def outcome(self, data: bytes) -> str:
        name, data = data.split(b"\n", 1)
        self.place.mkdir(exist_ok=True)
        for other, content in self.files.items():
            (self.place / other).write_bytes(content)
        (self.place / name.decode()).write_bytes(data)
        found = TokenCache.open(self.folder, small_tokenizer(), self.texts, 24).pack(np.arange(3))
        assert all(np.array_equal(a, b) for a, b in zip(found, self.known, strict=True)), "damaged tokens were believed"
        return REPAIRED if (self.place / name.decode()).read_bytes() != data else READ


class Config(Kind):
    """config.json of a run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.config = small_config(steps=3, data="data", out=folder)
        self.whole = as_json(to_json(self.config))

    def mutant(self, draw: random.Random) -> bytes:
        known = to_json(self.config)
        return as_json(edited_json(known, draw)) if draw.random() < 0.8 else edited(as_json(known), random_edits(draw))

    def outcome(self, data: bytes) -> str:
        from syncmask_fast.distributed.group import SINGLE_PROCESS
        from syncmask_fast.training.run_dir import create_run_dir

        shutil.rmtree(self.folder)
        (self.folder / "checkpoints").mkdir(parents=True)
        (self.folder / "config.json").write_bytes(data)
        create_run_dir(self.config, SINGLE_PROCESS)
        return READ


class ModelFolder(Kind):
    """config.json, tokenizer.json or model.safetensors of a model that somebody shares."""

    name = "config.json"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        SyncMaskModel(small_config(), small_tokenizer()).save_pretrained(folder)
        self.whole = (folder / self.name).read_bytes()

    def outcome(self, data: bytes) -> str:
        (self.folder / self.name).write_bytes(data)
        SyncMaskModel.from_pretrained(self.folder)
        return READ

    def mutant(self, draw: random.Random) -> bytes:
        if self.name.endswith(".json") and draw.random() < 0.8:
            return as_json(edited_json(json.loads(self.whole), draw))
        return edited(self.whole, random_edits(draw))


class ModelTokenizer(ModelFolder):
    name = "tokenizer.json"


class ModelWeights(ModelFolder):
    name = "model.safetensors"

    def mutant(self, draw: random.Random) -> bytes:
        if draw.random() < 0.5:
            return edited(self.whole, random_edits(draw))
        size = int.from_bytes(self.whole[:8], "little")
        header = as_json(edited_json(json.loads(self.whole[8 : 8 + size]), draw))
        return len(header).to_bytes(8, "little") + header + self.whole[8 + size :]


class Checkpoint(Kind):
    """Any file of the newest of two checkpoints; the older one must be taken then."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.state = new_state()
        for step in (1, 2):
            self.state.step = step
            save_checkpoint(folder / "kept", self.state)
        self.names = sorted(path.name for path in (folder / "kept/step-00000002").iterdir())

    def mutant(self, draw: random.Random) -> bytes:
        name = draw.choice(self.names)
        data = (self.folder / "kept/step-00000002" / name).read_bytes()
        changed = (
            as_json(edited_json(json.loads(data), draw))
            if name.endswith("json") and draw.random() < 0.5
            else edited(data, random_edits(draw))
        )
        return name.encode() + b"\n" + changed

    def outcome(self, data: bytes) -> str:
        name, data = data.split(b"\n", 1)
        used = self.folder / "used"
        shutil.rmtree(used, ignore_errors=True)
        shutil.copytree(self.folder / "kept", used)
        file = used / "step-00000002" / name.decode()
        changed = data != file.read_bytes()
        file.write_bytes(data)
        said = io.StringIO()
        with redirect_stderr(said):
            taken = load_latest(used, self.state)
        if taken.name == "step-00000002":
            same_json = name.endswith(b"json") and json.loads(data) == json.loads(
                (self.folder / "kept/step-00000002/state.json").read_text()
            )
            assert not changed or same_json, "a damaged checkpoint was believed"
            return READ
        assert self.state.step == 1
        assert "WARNING" in said.getvalue()
        return "the one before was taken, with a line"


class Metrics(Kind):
    """metrics.jsonl of a run that resumes at step 5."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.whole = "".join(
            json.dumps({"step": step, "loss": 1.5, "epoch": 0}) + "\n" for step in range(1, 9)
        ).encode()

    def outcome(self, data: bytes) -> str:
        (self.folder / "metrics.jsonl").write_bytes(data)
        with redirect_stderr(io.StringIO()) as said:
            MetricsLog(small_config(out=self.folder), 5, 9, torch.device("cpu"), 1.0).file.close()
        steps = [json.loads(line)["step"] for line in (self.folder / "metrics.jsonl").read_bytes().splitlines()]
        assert steps == sorted(set(steps))
        assert all(step <= 5 for step in steps)
        assert steps == [1, 2, 3, 4, 5] or said.getvalue() or not steps
        return READ if steps == [1, 2, 3, 4, 5] else "read, with a line on the rows that are missing"


class TripletFile(Kind):
    """The triplets of composed retrieval beside the shards."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "0.tar").write_bytes(
            shard([as_json(RECORD | {"product_id": n}) for n in range(4)], [encoded_image(n, 40, 30) for n in range(4)])
        )
        self.split = Split(ShardIndex.open(folder), np.arange(4))
        self.whole = as_json(
            [
                {"class": "dress", "candidate": f"s{a}", "target": f"s{b}", "captions": ["is red", "has a zip"]}
                for a, b in ((0, 1), (1, 2), (2, 3))
            ]
        )

    def mutant(self, draw: random.Random) -> bytes:
        if draw.random() < 0.3:
            return edited(self.whole, random_edits(draw))
        return as_json(edited_json(json.loads(self.whole), draw))

    def outcome(self, data: bytes) -> str:
        (self.folder / "triplets.json").write_bytes(data)
        found = open_triplets(self.split)
        assert found.target.max() < 4
        TokenCache.open(self.folder / "cache", small_tokenizer(), found.captions, 24)
        return READ


KINDS: dict[str, type[Kind]] = {
    "tar": Tar,
    "JSON member": JsonMember,
    "image": EncodedImage,
    "index cache": IndexCache,
    "index cache, forged": IndexArrays,
    "token cache": Tokens,
    "config of a run": Config,
    "config of a model": ModelFolder,
    "tokenizer of a model": ModelTokenizer,
    "weights of a model": ModelWeights,
    "checkpoint": Checkpoint,
    "metrics.jsonl": Metrics,
    "triplets": TripletFile,
}


def new_state() -> TrainState:
    config = small_config()
    torch.manual_seed(0)
    model = SyncMaskModel(config, small_tokenizer())
    return TrainState.create(model, config, {"samples": 5, "data": "d", "tokenizer": "t"})


def feed(kind: Kind, data: bytes) -> str:
    """What becomes of one mutant. Anything but a `UserError` of one line goes up as it is: that is a crash."""
    try:
        return kind.outcome(data)
    except UserError as error:
        sentence = str(error)
    if not sentence.strip() or "\n" in sentence:
        raise AssertionError(f"not one line: {sentence!r}")
    return REFUSED


# What an input must never bring about
# -----------------------------------------------------------------------------------------------------

_watched: list[tuple[Path, list[str]]] = []
_FORBIDDEN = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
    "ctypes.dlopen",
}
_WITH_FOLDERS = {
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
}  # whose last arguments are descriptors of folders, or -1
_CHANGING = {
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
}


def _hook(event: str, arguments: tuple) -> None:
    if not _watched:
        return
    allowed, seen = _watched[-1]
    if event in _FORBIDDEN:
        seen.append(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        changed = [(arguments[0], -1)]
    elif event in _CHANGING:
        paths = [path for path in arguments if isinstance(path, str | bytes | os.PathLike)]
        folders = arguments[-len(paths) :] if event in _WITH_FOLDERS else [-1] * len(paths)
        changed = list(zip(paths, folders, strict=True))
    else:
        changed = []
    for path, folder in changed:
        if isinstance(path, int):
            continue
        base = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
        if not Path(os.path.realpath(os.path.join(base, os.fsdecode(path)))).is_relative_to(allowed):
            seen.append(f"{event} {path!r}")


sys.addaudithook(_hook)


@contextmanager
def watched(allowed: Path, gigabytes: float = 4) -> Iterator[None]:
    """Fails where the code within starts a process, opens a connection, unpickles a class or writes outside `allowed`;
    and gives it so much more memory (address space) than there is at the start, and no more."""
    seen: list[str] = []
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(gigabytes * 2**30), before[1]))
    _watched.append((Path(os.path.realpath(allowed)), seen))
    try:
        yield
    finally:
        _watched.pop()
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not seen, seen
