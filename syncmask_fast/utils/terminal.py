"""Results as lines and tables in a terminal."""

from __future__ import annotations


def print_results(results: dict[str, float]) -> None:
    """Print one metric per line."""
    for name, value in results.items():
        print(f"{name:52s} {value:8.2f}")


def markdown_table(rows: list[dict]) -> str:
    """Return rows with the same keys as a Markdown table; floats have one decimal."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        lines.append("| " + " | ".join(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    return "\n".join(lines)
