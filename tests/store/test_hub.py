"""push and pull, of stores and models; what stands in for the hub is a folder, and nothing else is replaced."""

import json
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from support.exported import pretrained

from seitpp import StoreWriter, TokenStore, cli
from seitpp.export import export_model, push_model
from seitpp.models import ModelError
from seitpp.store import StoreError, hub, layout
from seitpp.store.hub import HubError


@pytest.fixture
def store(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, n in (("train", 20), ("validation", 6)):
        with StoreWriter(tmp_path / "store", codebook=np.eye(9), grid=(3, 3), split=split) as out:
            out.add_batch(rng.integers(0, 9, (n, 3, 3)), rng.integers(0, 4, n))
    return tmp_path / "store"


@pytest.fixture
def remote(tmp_path: Path, monkeypatch) -> Path:
    """Folder of the repositories; calls take what the real ones take, and copy files instead of sending them."""
    root = tmp_path / "remote"

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        assert exist_ok
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        (root / repo_id / ".private").write_text(str(private))
        return f"https://hub/{repo_type}s/{repo_id}"

    def upload_folder(self, *, repo_id, repo_type, folder_path, commit_message, allow_patterns, delete_patterns):
        assert commit_message
        (root / repo_id / ".type").write_text(repo_type)
        for path in files(root / repo_id):
            if any(fnmatch(path, pattern) for pattern in delete_patterns):
                (root / repo_id / path).unlink()
        copy(Path(folder_path), root / repo_id, allow_patterns)

    def snapshot_download(repo_id, *, repo_type, local_dir, allow_patterns):
        assert repo_type == "dataset"
        copy(root / repo_id, Path(local_dir), allow_patterns)
        (Path(local_dir) / ".cache").mkdir(exist_ok=True)
        (Path(local_dir) / ".cache" / "tokens.json.metadata").write_text("what was downloaded")
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def copy(source: Path, target: Path, patterns: list[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in files(source):
        if any(fnmatch(name, pattern) for pattern in patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def test_what_is_pushed_is_pulled(store, remote, tmp_path):
    assert hub.push(store, "me/tokens", private=True) == "https://hub/datasets/me/tokens"
    assert (remote / "me/tokens/.private").read_text() == "True"
    assert (remote / "me/tokens/.type").read_text() == "dataset"
    pulled = hub.pull("me/tokens", tmp_path / "pulled")
    assert contents(pulled) == contents(store)
    TokenStore(pulled).verify()


def test_only_the_files_of_the_store_travel(store, remote, tmp_path):
    (store / "secret.txt").write_text("mine")
    (store / "train" / "notes").write_text("mine")
    hub.push(store, "me/tokens")
    assert set(files(remote / "me/tokens")) == {*json.loads((store / "tokens.json").read_text())["files"]} | {
        *("tokens.json", ".private", ".type"),
    }
    (remote / "me/tokens/train/extra.arrow").write_text("theirs")
    assert "train/extra.arrow" not in files(hub.pull("me/tokens", tmp_path / "pulled"))


def test_a_push_removes_the_shards_of_an_earlier_store(store, remote):
    (remote / "me/tokens/train").mkdir(parents=True)
    (remote / "me/tokens/train/data-00000-of-00009.arrow").write_text("old")
    hub.push(store, "me/tokens")
    assert "train/data-00000-of-00009.arrow" not in files(remote / "me/tokens")


def test_a_damaged_store_is_not_pushed(store, remote):
    path = store / layout.CODEBOOK
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(StoreError, match=r"codebook.safetensors: SHA-256"):
        hub.push(store, "me/tokens")
    assert not remote.exists()


@pytest.mark.parametrize("name", ["train/data-00000-of-00001.arrow", "codebook.safetensors", "tokens.json"])
def test_a_damaged_download_is_refused_and_not_put_in_place(store, remote, tmp_path, name):
    hub.push(store, "me/tokens")
    path = remote / "me/tokens" / name
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(StoreError, match=name):
        hub.pull("me/tokens", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    path.write_bytes(data)
    TokenStore(hub.pull("me/tokens", tmp_path / "pulled")).verify()


def test_a_file_name_that_leads_outside_is_refused(store, remote, tmp_path):
    hub.push(store, "me/tokens")
    repository = remote / "me/tokens"
    document = json.loads((repository / "tokens.json").read_text())
    layout.write_document(
        repository, {**document, "files": {**document["files"], "../x": document["files"]["README.md"]}}
    )
    with pytest.raises(StoreError, match=r"file name '\.\./x'"):
        hub.pull("me/tokens", tmp_path / "pulled")


def test_a_repository_without_a_store_is_refused(remote, tmp_path):
    (remote / "me/pictures").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"me/pictures on the hub: no token store, it has no file tokens\.json"):
        hub.pull("me/pictures", tmp_path / "pulled")


def test_nothing_is_overwritten(store, remote):
    hub.push(store, "me/tokens")
    with pytest.raises(HubError, match="exists already and nothing is overwritten"):
        hub.pull("me/tokens", store)


def test_without_a_folder_the_cache_is_used_and_used_again(store, remote, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hub.push(store, "me/tokens")
    pulled = hub.pull("me/tokens")
    assert pulled == (tmp_path / "cache/seitpp/hub/me--tokens").resolve()
    shutil.rmtree(remote)
    assert hub.pull("me/tokens") == pulled
    path = pulled / layout.CODEBOOK
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(StoreError, match=r"codebook.safetensors: SHA-256"):
        hub.pull("me/tokens")


@pytest.mark.parametrize("repo_id", ["", "a//b", "../../x", "/etc/x", "a/b/c"])
def test_ids_that_are_none_are_refused_before_anything_is_made(remote, tmp_path, monkeypatch, repo_id):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(HubError, match=f"^{repo_id} on the hub: "):
        hub.pull(repo_id)
    assert not (tmp_path / "cache").exists()


def test_offline_is_one_line(store, tmp_path):
    """The real huggingface_hub, without a network."""
    for ask in (lambda: hub.pull("me/tokens", tmp_path / "pulled"), lambda: hub.push(store, "me/tokens")):
        with pytest.raises(HubError, match=r"^me/tokens on the hub: .*HF_HUB_OFFLINE") as caught:
            ask()
        assert len(str(caught.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_a_store_opens_by_its_hub_id(store: Path, remote: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hub.push(store, "me/tokens")
    opened, local = TokenStore("hf://me/tokens", "validation"), TokenStore(store, "validation")
    assert opened.path == hub.cache_folder("me/tokens").resolve()
    assert np.array_equal(opened.ids(range(6)), local.ids(range(6)))
    with pytest.raises(StoreError, match="no such folder"):
        TokenStore("me/tokens")  # a path, which never reaches the network


# Models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return export_model(pretrained(tmp_path / "run"), tmp_path / "model")


def test_a_model_is_pushed_as_a_model(model: Path, remote: Path, monkeypatch, capsys) -> None:
    """What is there besides it stays behind, the card as the user left it goes along."""
    (model / "README.md").write_text("license: mit")
    before = contents(model)
    (model / "secret.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["seitpp", "push", str(model), "me/mtm", "--private"])
    cli.main()
    assert capsys.readouterr().out == "https://hub/models/me/mtm\n"
    assert contents(remote / "me/mtm") == {**before, ".private": b"True", ".type": b"model"}


def test_a_push_removes_the_weights_of_an_earlier_model(model: Path, remote: Path) -> None:
    push_model(model, "me/mtm")
    (model / "mtm/model.safetensors").unlink()
    push_model(model, "me/mtm")
    assert "mtm/model.safetensors" not in files(remote / "me/mtm")
    assert (remote / "me/mtm/.private").read_text() == "False"


def test_what_is_no_whole_model_is_not_pushed(
    model: Path, remote: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    for name in ("mtm/model.safetensors", "model.safetensors"):
        (model / name).write_bytes((model / name).read_bytes()[:-100])
        with pytest.raises(ModelError, match=f"{name} cannot be read"):
            push_model(model, "me/mtm")
    with pytest.raises(
        ModelError, match="run: got a run, expected an exported model: export it with `seitpp export-model`"
    ):
        push_model(tmp_path / "run", "me/mtm")
    monkeypatch.setattr(sys, "argv", ["seitpp", "push", str(tmp_path), "me/mtm"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "neither a token store nor a folder of export-model" in capsys.readouterr().err
    assert not remote.exists()


def test_a_model_offline_is_one_line(model: Path) -> None:
    with pytest.raises(HubError, match=r"^me/mtm on the hub: .*HF_HUB_OFFLINE"):
        push_model(model, "me/mtm")
