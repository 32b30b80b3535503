"""Stores on the Hugging Face hub, where a store is a dataset repository, file by file; uploads, of models too."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from seitpp.errors import UserError
from seitpp.files import cache_root, remove_folder, sync
from seitpp.store import layout
from seitpp.store.layout import StoreError

# What huggingface_hub leaves in a folder that it downloads to.
DOWNLOAD_CACHE = ".cache"

Result = TypeVar("Result")


class HubError(UserError):
    """The hub cannot be reached, or does not give what it is asked for."""


def push(store: str | os.PathLike[str], repo_id: str, private: bool = False) -> str:
    """Upload the folder `store` as the dataset `repo_id` ("owner/name"), made if there is none; its address.

    One commit, after which the repository has the shards of this store only. Every file is verified before.
    Raises StoreError for a damaged store, HubError for what the hub refuses.
    """
    root = Path(store).resolve()
    document = layout.read_document(root)
    layout.check_files(root, document["files"], document["files"], checksums=True)
    message = f"Token store {document['checksum'][:12]}"
    # Shards of an earlier store would be read as images of this one by other programs.
    return upload(root, repo_id, "dataset", _file_names(document), message, private, stale="*.arrow")


def upload(root: Path, repo_id: str, kind: str, names: list[str], message: str, private: bool, stale: str) -> str:
    """Put the files `names` of the folder `root` into the repository `repo_id`, in one commit; its address.

    `kind` is dataset or model. The repository is made if there is none, `private` or not; other files that match
    `stale` are removed from it. Raises HubError for what the hub refuses.
    """
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
    """Download the store `repo_id` ("owner/name") into `folder`, verify every file, and return its path.

    Without a folder it goes into the user's cache, and one that is there is verified and used again, offline too.
    An interrupted download is taken up again. Raises HubError for what the hub refuses, for a folder that exists,
    and without a network; StoreError for a repository that is no store or a damaged one.
    """
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
    """Where `pull` puts a store for which no folder is named."""
    return cache_root() / "hub" / repo_id.replace("/", "--")


def _download(repo_id: str, staging: Path) -> None:
    """tokens.json first, since it says which files there are; no other file of the repository is fetched."""
    _fetch(repo_id, staging, [layout.DOCUMENT])
    if not (staging / layout.DOCUMENT).is_file():
        raise StoreError(f"{repo_id} on the hub: no token store, it has no file {layout.DOCUMENT}")
    _fetch(repo_id, staging, _file_names(layout.read_document(staging)))
    remove_folder(staging / DOWNLOAD_CACHE)
    _verified(staging)


def _fetch(repo_id: str, folder: Path, names: list[str]) -> None:
    # With local_dir the files are there themselves, not links into a cache.
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
    except Exception as error:  # besides its own, huggingface_hub passes on those of its HTTP library
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HubError(
            f"{repo_id} on the hub: {reason}; check its name, the network and `hf auth login`"
        ) from error
