"""Read parts of the objects in buckets; also a program, which does it for a process that cannot itself.

The threads of obstore do not live on in a forked process, as a worker of a data loader is. Such a process starts
this program, which needs nothing but obstore, and asks it: each line of its input is the JSON of a URL and the
arguments of `read_range`, and each answer a line of JSON, [bytes that follow] or [kind of error, its text]. It
ends with its input.
"""

import json
import sys
import time
from datetime import timedelta
from functools import cache
from typing import Any

TRIES = 4  # of one request that breaks off, besides those of obstore
RETRIES: dict[str, Any] = {"max_retries": 8, "retry_timeout": timedelta(seconds=120)}


def read_range(store: Any, name: str, *, start: int, end: int, tag: str | None) -> bytes:
    """Return the bytes start .. end - 1 of an object, which must have the tag. Raises what obstore raises."""
    from obstore import exceptions, get

    options = {"range": (start, end), **({"if_match": tag} if tag else {})}
    for tries in range(1, TRIES + 1):
        try:
            return bytes(get(store, name, options=options).bytes())
        except (exceptions.PreconditionError, FileNotFoundError):
            raise
        except exceptions.BaseError:
            if tries == TRIES:
                raise
            time.sleep(2**tries / 4)
    raise AssertionError("not reached")


def main() -> None:
    from obstore.store import from_url

    opened = cache(lambda url: from_url(url, retry_config=RETRIES))
    for line in sys.stdin:
        url, request = json.loads(line)
        try:
            data, answer = read_range(opened(url), **request), None
        except Exception as error:
            data, answer = b"", [type(error).__name__, str(error)]
        sys.stdout.buffer.write(json.dumps(answer or [len(data)]).encode() + b"\n" + data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
