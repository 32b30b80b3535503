"""Class-incremental learning by Experience Replay, with a memory counted in bytes (SeiT)."""
