"""Many encoded images in one folder, memory-mapped; docs/format.md gives every byte."""

from seitpp.store.layout import StoreError
from seitpp.store.reader import TokenStore
from seitpp.store.staging import SplitStaging
from seitpp.store.writer import StoreWriter

__all__ = ["SplitStaging", "StoreError", "StoreWriter", "TokenStore"]
