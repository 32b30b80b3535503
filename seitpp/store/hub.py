"""Upload and download of stores as dataset repositories of the Hugging Face hub, and upload of models."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from seitpp.errors import UserError, os_message
from seitpp.files import cache_root, naming, remove_folder, sync
from seitpp.store import layout
from seitpp.store.layout import StoreError

# huggingface_hub leaves this folder in the target of a download.
DOWNLOAD_CACHE = ".cache"

Result = TypeVar("Result")


class HubError(UserError):
    """Raised if the hub cannot be reached or refuses a request."""


def push(store: str | os.PathLike[str], repo_id: str, private: bool = False) -> str:
    """Upload the folder `store` as the dataset `repo_id` ("owner/name") and return its URL.

    The repository is created if there is none. Every file is verified first; the upload is one commit, which also
    removes the shards of earlier stores. Raises StoreError for a damaged store, HubError if the hub refuses.
    """
    root = Path(store).resolve()
    document = layout.read_document(root)
    layout.check_files(root, document["files"], document["files"], checksums=True)
    message = f"Token store {document['checksum'][:12]}"
    return upload(
        root,
        repo_id,
        kind="dataset",
        names=_file_names(document),
        message=message,
        private=private,
        stale="*.arrow",  # other programs would read shards of an earlier store as images of this one
    )


def upload(
    root: Path, repo_id: str, *, kind: str, names: list[str], message: str, private: bool, stale: str
) -> str:
    """Upload the files `names` of the folder `root` to the repository `repo_id` in one commit and return its URL.

    `kind` is "dataset" or "model". The repository is created, `private` or not, if there is none; its other files
    that match the pattern `stale` are removed. Raises HubError if the hub refuses.
    """
    from huggingface_hub import HfApi  # takes a while, and few commands need the hub

    api = HfApi()
    repository = _ask(repo_id, api.create_repo, repo_id, repo_type=kind, private=private, exist_ok=True)
    _ask(
        repo_id,
        api.upload_folder,
        repo_id=repo_id,
        repo_type=kind,
        folder_path=root,
        commit_message=message,
        allow_patterns=names,
        delete_patterns=[stale],
    )
    return str(repository)


def pull(repo_id: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Download the store `repo_id` ("owner/name") into the new `folder`, verify every file, and return its path.

    Without `folder` the store goes into the user's cache; a cached store is verified and reused, also offline. An
    interrupted download is resumed. Raises HubError if the hub refuses or cannot be reached, or if `folder`
    exists; StoreError if the repository holds no store or a damaged one.
    """
    from huggingface_hub.utils import validate_repo_id

    _ask(repo_id, validate_repo_id, repo_id)
    target = (Path(folder) if folder is not None else cache_folder(repo_id)).resolve()
    if target.exists() and folder is not None:
        raise HubError(f"{target}: exists already and nothing is overwritten; choose another folder")
    if not target.exists():
        staging = target.with_name(f".{target.name}-{repo_id.replace('/', '--')}")
        _download(repo_id, staging)
        staging.rename(target)
        sync(target.parent)
    return _verified(target)


def cache_folder(repo_id: str) -> Path:
    """Return the folder into which `pull` downloads a store if none is given."""
    return cache_root() / "hub" / repo_id.replace("/", "--")


def _download(repo_id: str, staging: Path) -> None:
    """Download tokens.json, and then only the files that it lists."""
    _fetch(repo_id, staging, [layout.DOCUMENT])
    if not (staging / layout.DOCUMENT).is_file():
        raise StoreError(f"{repo_id} on the hub: no token store, it has no file {layout.DOCUMENT}; check the id")
    _fetch(repo_id, staging, _file_names(layout.read_document(staging)))
    remove_folder(staging / DOWNLOAD_CACHE)
    _verified(staging)


def _fetch(repo_id: str, folder: Path, names: list[str]) -> None:
    import huggingface_hub

    # local_dir: the files themselves instead of links into the cache of huggingface_hub.
    with naming(folder):
        _ask(
            repo_id,
            huggingface_hub.snapshot_download,
            repo_id,
            repo_type="dataset",
            local_dir=folder,
            allow_patterns=names,
        )


def _file_names(document: dict[str, Any]) -> list[str]:
    return [layout.DOCUMENT, *document["files"]]


def _verified(root: Path) -> Path:
    files = layout.read_document(root)["files"]
    layout.check_files(root, files, files, checksums=True)
    return root


def _ask(repo_id: str, request: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
    try:
        return request(*args, **kwargs)
    except Exception as error:  # huggingface_hub also passes on errors of its HTTP library
        if isinstance(error, OSError) and os_message(error):  # of this machine
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HubError(
            f"{repo_id} on the hub: {reason}; check its name, the network and `hf auth login`"
        ) from error
