"""Download one object of a bucket into a file; also a program of its own, which needs nothing but obstore.

    python download.py URL NAME FILE BYTES

The threads of obstore do not live on in a forked process, as a worker of a data loader is. Who used it before a
fork downloads by this program after it.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

PART = 2**23  # bytes of one request
TRIES = 4  # of one request that breaks off, besides those of obstore
RETRIES: dict[str, Any] = {"max_retries": 8, "retry_timeout": timedelta(seconds=120)}


def download(store: Any, name: str, path: Path, *, size: int) -> None:
    """Append to the file what it lacks of an object of `size` bytes. Raises what obstore raises."""
    import obstore

    with path.open("ab") as file:
        if file.seek(0, 2) > size:
            file.truncate(0)
        tries = 0
        while (start := file.seek(0, 2)) < size:
            try:
                file.write(obstore.get_range(store, name, start=start, end=min(start + PART, size)))
            except obstore.exceptions.BaseError:
                tries += 1
                if tries == TRIES:
                    raise
                time.sleep(2**tries / 4)


def main() -> None:
    import obstore.store

    url, name, path, size = sys.argv[1:]
    try:
        download(obstore.store.from_url(url, retry_config=RETRIES), name, Path(path), size=int(size))
    except Exception as error:
        sys.exit(" ".join(str(error).partition("Debug source")[0].split()))


if __name__ == "__main__":
    main()
