"""syncmask_fast: fast pretraining of fashion vision-language models with SyncMask."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"
__all__ = ["SyncMaskModel", "__version__"]

# Source tree: kernels/ lies beside this package; a wheel carries it inside.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> object:
    if name == "SyncMaskModel":  # on demand: the model imports timm and transformers
        from syncmask_fast.model.syncmask_model import SyncMaskModel

        return SyncMaskModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
