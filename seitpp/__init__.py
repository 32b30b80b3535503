"""Train vision models on images stored as grids of discrete token ids, about one kilobyte per image.

Its packages, from the lowest layer to the highest: codec, store, images, tokenizers, data, augment, models,
objectives, engine. Importing `seitpp` imports codec and store only, and not torch.
"""

from seitpp.store import StoreWriter, TokenStore

__version__: str

__all__ = ["StoreWriter", "TokenStore", "__version__"]


def __getattr__(name: str) -> str:
    """Return the version when it is asked for: every command would wait for the look-up."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("seitpp")
