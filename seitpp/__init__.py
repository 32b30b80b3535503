"""Train vision models on images stored as grids of discrete token ids, about one kilobyte per image.

Its packages, from the lowest layer to the highest: codec, store, images, tokenizers, data, augment, models,
objectives, engine. Importing `seitpp` imports codec and store only, and not torch.
"""

from importlib.metadata import version

from seitpp.store import StoreWriter, TokenStore

__version__ = version("seitpp")

__all__ = ["StoreWriter", "TokenStore", "__version__"]
