"""The words and the error messages of the project: docs/style.md, as tests."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

IZE = (
    "normal|optim|token|initial|vector|serial|synchron|recogn|special|organ|summar|parallel|util|quant|minim|maxim|general"
    "|orthogonal|material|random|real|standard"
)
# Regular expression -> what to write instead. Underscores and digits end a word, so identifiers are checked too.
FORBIDDEN = {
    r"anew": "again",
    r"(?:go|goes|going|went)[\s_]+on": "resume, continue",
    r"(?:hang|hangs|hung)[\s_]+on": "depend on",
    r"be[\s_]+it": "whether",
    r"mend(?:s|ed|ing)?": "fix",
    r"the[\s_]+parents": "ALBEF, GRIT-VLP, FashionSAP; the baseline",
    r"of[\s_]+its[\s_]+own[\s_]+accord": "by itself",
    r"word[\s_]+pieces?": "token",
    rf"\w*(?:{IZE})is(?:e|es|ed|er|ers|ing|ation)": "-ize",
    r"\w*(?:colour|behaviour|neighbour|favour|honour)\w*": "-or",
    r"(?:half)?centre[sd]?": "center",
    r"learnt|spelt|labelled|modelling|analyse[sd]?|whilst": "learned, labeled, ...",
}
PICTURE = r"pictures?"  # a drawn page or sheet; a product's is an image
PICTURE_ALLOWED = (
    "syncmask_fast/report/",
    "syncmask_fast/sources/lookbook/",
    "syncmask_fast/sources/table.py",  # a usual name of users' columns
    "tests/test_report.py",
    "tests/test_lookbook.py",
)
EXEMPT = ("docs/style.md", "tests/test_language.py")  # these list the words
SUFFIXES = (".py", ".md", ".h", ".inl", ".cpp", ".cu", ".sh", ".toml", ".j2")


def word(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", re.IGNORECASE)


def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.splitlines() if name.endswith(SUFFIXES) and (ROOT / name).is_file()]


def test_forbidden_words():
    found = []
    for name in tracked_files():
        if name in EXEMPT:
            continue
        text = (ROOT / name).read_text()
        rules = FORBIDDEN if name.startswith(PICTURE_ALLOWED) else {**FORBIDDEN, PICTURE: "image"}
        for pattern, instead in rules.items():
            for match in word(pattern).finditer(text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{name}:{line}: {match[0]!r}: write {instead}")
    assert not found, "\n".join(["", *found])


def literal(node: ast.expr) -> str | None:
    """Return a message's text with "{}" for each value that is filled in, or None for a message from elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def user_errors(path: Path) -> list[tuple[int, str]]:
    """Return line and text of every message that is written out in a call of `UserError`."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "id", getattr(call.func, "attr", "")) == "UserError"]
    texts = [(call.lineno, literal(call.args[0])) for call in calls if call.args]
    return [(line, text) for line, text in texts if text is not None]


def test_error_messages():
    """A message starts with a capital letter, a flag or a value, and ends in a full stop, perhaps its last value's."""
    wrong = []
    for name in tracked_files():
        if not name.startswith(("syncmask_fast/", "kernels/")) or not name.endswith(".py"):
            continue
        for line, text in user_errors(ROOT / name):
            if not re.match(r"[A-Z]|--|\{\}|timm |torchrun ", text) or not re.search(r"\.$|^\{\}$|[.:] \{\}$", text):
                wrong.append(f"{name}:{line}: {text}")
    assert not wrong, "\n".join(["", *wrong])


def anchors(text: str) -> set[str]:
    """Return the fragments by which GitHub links to the headings of a Markdown text."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_documents_name_what_exists():
    """Links, their headings, and file names between backticks."""
    missing = []
    for name in tracked_files():
        if not name.endswith(".md"):
            continue
        here, text = ROOT / name, (ROOT / name).read_text()
        for link, _, heading in re.findall(r"\]\((?!\w+:)([^)#\s]*)(#([^)]+))?\)", text):
            target = here.parent / link if link else here
            if not target.exists() or (heading and heading not in anchors(target.read_text())):
                missing.append(f"{name}: {link}#{heading}")
        for file in re.findall(r"`((?:csrc|kernels|syncmask_fast|bench|tests|docs)/[\w./]*)`", text):
            placeholder = re.search(r"\bX[._]|_X\.|OPERATOR|__init__", file)
            if name != "CHANGELOG.md" and not placeholder and not (ROOT / file).exists():
                missing.append(f"{name}: {file}")
    assert not missing, "\n".join(["", *missing])
