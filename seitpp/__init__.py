"""Train vision models on images stored as grids of discrete token ids, about one kilobyte an image.

The floors, from the ground up: codec, store, tokenizers, tokens, augment, models, objectives, engine.
Importing this package imports the two lowest only, and not torch.
"""

from importlib.metadata import version

from seitpp.store import StoreWriter, TokenStore

__version__ = version("seitpp")

__all__ = ["StoreWriter", "TokenStore", "__version__"]
