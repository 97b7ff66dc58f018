"""The shape of the project: what imports what, what the binary needs, what README names."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from syncmask_fast import _native

ROOT = Path(__file__).resolve().parents[1]

# Each module or folder of syncmask_fast imports only from rows above its own, or from its own folder.
ORDER = "utils < kernels < ops < distributed < data < config, sources < model < objective < training < tasks < report"
COMMANDS = ("train, evaluate, pack, search", "finetune", "ablate")  # finetune reuses train's loop, ablate both commands
LAYERS = [set(row.split(", ")) for row in (*ORDER.split(" < "), *COMMANDS)]
LAYERS[0].add("_native")  # what `kernels` loads the compiled operators by


def modules() -> dict[str, Path]:
    """Import name -> file of every module of the source tree, the package's own __init__ left out."""
    found = {}
    for folder, name in ((ROOT / "syncmask_fast", "syncmask_fast"), (ROOT / "kernels", "syncmask_fast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    del found["syncmask_fast"]  # imports the model on demand only
    return found


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The project's modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # one dot is the folder of the file, each further dot the folder above
                folder = module if path.name == "__init__.py" else module.rpartition(".")[0]
                parents = folder.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            for alias in node.names:  # a module of the folder, or a name that its __init__ defines
                submodule = f"{base}.{alias.name}"
                names.add(submodule if submodule in known else base)
    return names & known.keys()


def layer(module: str) -> int:
    part = module.split(".")[1]
    rows = [row for row, names in enumerate(LAYERS) if part in names]
    assert rows, f"{module} is in no row of LAYERS in {Path(__file__).name}; add it to one"
    return rows[0]


def test_imports_go_one_way():
    known = modules()
    wrong = []
    for module, path in known.items():
        for other in imports(module, path, known):
            same_folder = module.split(".")[1] == other.split(".")[1]
            if not same_folder and layer(other) >= layer(module):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_imports_have_no_cycle():
    known = modules()
    left = {module: imports(module, path, known) - {module} for module, path in known.items()}
    while left:
        free = {module for module, others in left.items() if not others & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {module: others for module, others in left.items() if module not in free}


def test_no_test_imports_another():
    """What two test modules share is in tests/helpers.py, a module next to it, or a fixture of tests/conftest.py."""
    for path in (ROOT / "tests").rglob("*.py"):
        found = re.findall(r"^\s*(?:from|import) (tests\.(?:\w+\.)*test_\w+)", path.read_text(), re.M)
        assert not found, f"{path.relative_to(ROOT)} imports {found}: move what it needs to tests/helpers.py"


def test_kernels_is_no_package_of_its_own():
    # A regular package of that name would shadow Hugging Face's `kernels`, which transformers imports.
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "kernels.py").exists()
    assert not list((ROOT / "syncmask_fast").glob("kernels*"))


def run_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_ops_is_light():
    code = """
import json, sys
import syncmask_fast
package = ["torch" in sys.modules, syncmask_fast.__version__]
import torch
import syncmask_fast.ops
print(json.dumps([package, torch.cuda.is_initialized(), list(sys.modules)]))
"""
    package, cuda_started, loaded = json.loads(run_python(code).splitlines()[-1])
    version = re.search(r'__version__ = "(.+)"', (ROOT / "syncmask_fast/__init__.py").read_text())[1]
    assert package == [False, version]  # the package itself does not import torch
    heavy = {"timm", "transformers", "tokenizers", "nvidia.dali", "torchvision", "xformers", "sklearn", "PIL"}
    assert not heavy & set(loaded)
    own = {name for name in loaded if name.startswith("syncmask_fast.")}
    assert all(layer(name) <= layer("syncmask_fast.ops") for name in own)
    assert not cuda_started


@pytest.mark.skipif(_native.find() is None, reason="the C++ extension is not built")
def test_a_built_extension_loads():
    assert _native.load() == _native.find(), _native.describe()
    assert _native.build_info().startswith("csrc ")


@pytest.mark.parametrize("library", [_native.LIBRARY, _native.CUDA_LIBRARY])
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
def test_the_extension_needs_stable_symbols_only(library):
    """C functions of the stable ABI (aoti_torch_*, torch_*) may be missing; C++ ones of torch may not."""
    if _native.find(library) is None:
        pytest.skip(f"{library} is not built")
    command = ["nm", "-D", "--undefined-only", str(_native.find(library))]
    lines = subprocess.check_output(command, text=True).splitlines()
    symbols = [line.split()[-1].split("@")[0] for line in lines]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    # _ZN2at, _ZNK3c10, _ZTVN5torch ...: C++ names in the namespaces at, c10, torch and caffe2
    unstable = [s for s in symbols if re.match(r"_Z\w*?N[KVR]*(2at|3c10|5torch|6caffe2)", s) or re.match(r"_?Py", s)]
    assert not unstable


def test_wheel_has_no_forgotten_folder():
    """setup.py takes folders with an __init__.py: one without would be missing from a wheel."""
    for folder in {path.parent for path in (ROOT / "syncmask_fast").rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), folder


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    top = r"(?:csrc|kernels|syncmask_fast|bench|tests|docs|\.ci)/[\w./*-]*[\w*/]"
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"\w+:", link)]
    files = re.findall(rf"(?<![\w./-]){top}", text)
    files += re.findall(r"`((?:[A-Z]+\.md|Makefile|LICENSE|setup\.py|pyproject\.toml|constraints\.txt))`", text)
    missing = sorted({name for name in links + files if not list(ROOT.glob(name.rstrip("/")))})
    assert not missing
    assert files, "README names no file of the project"


def test_readme_names_make_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|\s)make ([a-z]+)(?=`|$|\s+#|\s+ARGS)", (ROOT / "README.md").read_text(), re.M))
    assert named <= targets


@pytest.mark.parametrize("script", sorted(ROOT.glob("bench/*.py")), ids=lambda path: path.name)
def test_benchmarks_import_what_there_is(script: Path):
    """They are not run here, so that a name that moved would stay unseen."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("syncmask_fast", "tests")):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                    f"{node.module}.{alias.name}"
                )
