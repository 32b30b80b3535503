"""Token stores: folders of encoded images, memory-mapped; docs/format.md describes every byte."""

from seitpp.store.layout import StoreError
from seitpp.store.reader import TokenStore
from seitpp.store.staging import SplitStaging
from seitpp.store.writer import StoreWriter

__all__ = ["SplitStaging", "StoreError", "StoreWriter", "TokenStore"]
