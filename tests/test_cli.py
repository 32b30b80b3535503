"""The command line: figures agree with a second count, conversions are exact, and a user's error is one line."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from support.faults import in_child
from support.paths import ROOT

from seitpp import StoreWriter, TokenStore, cli
from seitpp.books import Books
from seitpp.codebook import codebook_fingerprint
from seitpp.codec import CODECS
from seitpp.data.dataset import fraction_of
from seitpp.data.digits import digits
from seitpp.engine.reconstruction import naive_pictures
from seitpp.models import TokenAdapt
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.plots import paint_codes
from seitpp.store import layout
from seitpp.tokenizers import load

GRID, K = (4, 6), 20
CLASSES = ["digit", "letter", "other"]
SIZES = {"train": 50, "validation": 7}
SOURCE_BYTES = 4000


def sample(split: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """Ids, labels and columns; codes 18 and 19 do not occur, and the others not equally often."""
    n = SIZES[split]
    rng = np.random.default_rng(n)
    ids = np.minimum(rng.integers(0, K - 2, (n, *GRID)), rng.integers(0, K - 2, (n, *GRID)))
    columns = {
        "path": [f"{split}/{i}.jpg" for i in range(n)],
        "source_bytes": [SOURCE_BYTES + i % 2 for i in range(n)],
        "map": [bytes([i, 0, 255]) for i in range(n)],
    }
    return ids, np.arange(n) % len(CLASSES), columns


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for split in SIZES:
        with StoreWriter(
            tmp_path / "store",
            codebook=np.random.default_rng(0).normal(size=(K, 3)),
            grid=GRID,
            split=split,
            class_names=CLASSES,
            tokenizer={"fingerprint": "0123abcd" * 8, "spec": {"kind": "patch_kmeans"}},
            columns={"path": "string", "source_bytes": "int64", "map": "binary"},
        ) as writer:
            writer.add_batch(*sample(split))
    return tmp_path / "store"


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["seitpp", *map(str, arguments)])
    cli.main()


def fails(monkeypatch, capsys, *arguments: object) -> str:
    """What the failing command says, one line, with exit status 2 and nothing on stdout."""
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    return err


def installed(*arguments: object) -> subprocess.CompletedProcess:
    """The installed program, with the network blocked."""
    command = [Path(sys.executable).parent / "seitpp", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"}
    )


def rows(text: str) -> dict[str, list[str]]:
    """The lines of a table by their first word."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def damage(store: Path, split: str) -> None:
    """Change a payload and list the changed file, as a bug of a writer would."""
    payload = datasets.load_from_disk(str(store / split))[3]["tokens"]
    (name,) = layout.shard_names(layout.read_document(store), split)
    data = (store / name).read_bytes()
    assert data.count(payload) == 1
    (store / name).write_bytes(data.replace(payload, payload[:-1] + bytes([payload[-1] ^ 1])))
    relist(store, name)


def relist(store: Path, *names: str) -> None:
    """Put changed files into tokens.json."""
    document = layout.read_document(store)
    files = {**document["files"], **{name: layout.file_entry(store / name) for name in names}}
    layout.write_document(store, {**document, "files": files})


# info and verify


@pytest.mark.parametrize("command", ["info", "verify"])
def test_the_figures_agree_with_a_second_count(store, monkeypatch, capsys, command):
    run(monkeypatch, command, store)
    out = capsys.readouterr().out
    for split, n in SIZES.items():
        ids = sample(split)[0]
        _, counts = np.unique(ids, return_counts=True)
        bits = sum(-count / ids.size * np.log2(count / ids.size) for count in counts)
        size = sum(len(row["tokens"]) for row in datasets.load_from_disk(str(store / split))) / n
        bound = bits * ids[0].size / 8
        used = [str(len(counts)), "of", str(K)]
        expected = [str(n), *used, f"{bits:.3f}", f"{size:.1f}", f"{bound:.1f}", f"{size / bound:.3f}"]
        assert rows(out)[split] == expected
        source = SOURCE_BYTES + (n // 2) / n
        assert f"{split}: {source:,.1f} bytes per image, {source / size:.1f} times as many" in out
    if command == "info":
        facts = {name: " ".join(words) for name, words in rows(out).items()}
        assert (facts["grid"], facts["codebook"]) == ("4 x 6", "20 codes of dimension 3")
        assert (facts["classes"], facts["codec"]) == ("3: digit, letter, other", "ans")
        assert facts["tokenizer"] == "patch_kmeans 0123abcd0123abcd"
        size = sum(map(len, contents(store).values()))
        assert facts["on"] == f"disk {size:,} bytes, {size / sum(SIZES.values()):.1f} per image"


def test_of_a_large_split_info_says_that_it_sampled(store, monkeypatch, capsys):
    monkeypatch.setattr(cli, "SAMPLE", 10)
    run(monkeypatch, "info", store)
    assert "from 10 images spread over each larger split" in capsys.readouterr().out
    monkeypatch.setattr(cli, "SAMPLE", 50)
    run(monkeypatch, "info", store)
    assert "spread" not in capsys.readouterr().out


def test_a_store_without_source_sizes_and_names(tmp_path, monkeypatch, capsys):
    """Images with grids of their own, all of one code: the entropy is zero."""
    with StoreWriter(tmp_path / "store", codebook=np.eye(2), grid=None, codec="packed") as writer:
        for side in (1, 2, 3):
            writer.add(np.ones((side, 4), int), side)
    run(monkeypatch, "info", tmp_path / "store")
    out = capsys.readouterr().out
    assert "one for each image" in out and "not recorded" in out and "image files" not in out
    assert rows(out)["train"][1:5] == ["1", "of", "2", "0.000"] and rows(out)["train"][-1] == "-"


def test_missing_and_several_labels_are_said_and_shown(tmp_path, monkeypatch, capsys):
    titles: list[str] = []
    monkeypatch.setattr(cli, "_draw", lambda images, names, path: titles.extend(names) or path.touch())
    for multi_label, labels in ((False, [1, None, -1]), (True, [(0, 2), (), None])):
        path = tmp_path / str(multi_label)
        with StoreWriter(
            path, codebook=np.eye(2), grid=(1, 4), class_names=CLASSES, multi_label=multi_label
        ) as writer:
            writer.add_batch(np.ones((3, 1, 4), int), labels)
        run(monkeypatch, "info", path)
        run(monkeypatch, "show", path, "--out", tmp_path / f"{multi_label}.png")
    out = capsys.readouterr().out
    assert "no label     2 of 3 images of train" in out and "no label     1 of 3 images of train" in out
    assert "classes      3: digit" in out and "classes      3, several an image: digit" in out
    assert titles == ["letter", "no label", "no label", "digit, other", "no class", "no label"]


def test_subset_is_the_share_that_training_takes(store, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "subset", store, tmp_path / "a", "--fraction", 0.2, "--seed", 5)
    run(monkeypatch, "subset", store, tmp_path / "b", "--fraction", 0.5, "--split", "validation")
    assert capsys.readouterr().out.splitlines()[0].endswith("a: train 10 images, validation 7 images")
    for folder, split, fraction, seed in (("a", "train", 0.2, 5), ("b", "validation", 0.5, 0)):
        chosen = fraction_of(SIZES[split], fraction, seed)
        assert (TokenStore(tmp_path / folder, split).ids(range(len(chosen))) == sample(split)[0][chosen]).all()
    assert len(TokenStore(tmp_path / "b")) == 50


def test_verify_names_the_damaged_image_or_file(store, monkeypatch, capsys):
    run(monkeypatch, "verify", store)
    assert "files" in capsys.readouterr().out
    damage(store, "validation")
    message = fails(monkeypatch, capsys, "verify", store)
    assert "split 'validation', image 3 (" in message and "checksum does not match" in message
    (store / layout.CODEBOOK).unlink()
    assert "codebook.safetensors: missing" in fails(monkeypatch, capsys, "verify", store)


def test_the_installed_program(store, tmp_path):
    """One process each: what is printed, what is not, and the exit status."""
    info = installed("info", store)
    assert info.returncode == 0 and info.stderr == "" and rows(info.stdout)["train"][0] == "50"
    recoded = installed("recode", store, tmp_path / "packed", "--codec", "packed")
    assert recoded.returncode == 0 and rows(recoded.stdout)["validation"][0] == "7"
    picture = installed("show", tmp_path / "packed", "--out", tmp_path / "picture.png")
    assert picture.returncode == 0 and (tmp_path / "picture.png").exists()
    damage(store, "train")
    verify = installed("verify", store)
    assert verify.returncode == 2 and "image 3" in verify.stderr and verify.stdout == ""


# show


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two images, one of each code, with grids of their own."""
    codebook = np.array([[0.0], [1.0]])
    with StoreWriter(tmp_path / "two", codebook=codebook, grid=None, class_names=["no", "yes"]) as writer:
        writer.add(np.zeros((4, 4), int), 0)
        writer.add(np.ones((4, 4), int), 1)
    return tmp_path / "two"


def test_show_paints_the_images_in_order(two, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "show", two, "--out", tmp_path / "new" / "picture.png", "--count", 2)
    assert "2 of 2 images of split 'train'" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "new" / "picture.png").convert("RGB")) / 255
    height, width, _ = picture.shape
    codes = paint_codes(torch.tensor([[[0]], [[1]]]), Books.of(np.array([[0.0], [1.0]])))[:, :, 0, 0].numpy()
    assert np.abs(picture[height // 2, width // 4] - codes[0]).max() < 0.01
    assert np.abs(picture[height // 2, 3 * width // 4] - codes[1]).max() < 0.01
    assert np.abs(codes[0] - codes[1]).max() > 0.5


def test_show_decodes_with_the_tokenizer_of_the_store(tmp_path):
    data = digits()
    s = TokenStore(data.store, "validation")
    decode = cli._decoder(s, data.tokenizer, None)
    expected = load(data.tokenizer).decode(torch.from_numpy(s.ids([5])).long())[0]
    assert torch.equal(decode(s[5][0]), expected)
    assert not torch.equal(cli._decoder(s, None, None)(s[5][0]), expected)


def test_show_flips_and_crops_tokens(tmp_path, monkeypatch, capsys):
    """As Figure 3 of SeiT++: a mirrored grid is not what the tokenizer makes of the mirrored image."""
    data, out = digits(), tmp_path / "flipped.png"
    line = ["show", data.store, "--tokenizer", data.tokenizer, "--augment", "--split", "validation", "--out", out]
    run(monkeypatch, *line, "--count", 4)
    assert re.search(r"4 of 360 images.*\nflip of the tokens +\d+\.\d\ncrop of the", capsys.readouterr().out, re.S)
    tokenizer = load(data.tokenizer)
    ids = torch.from_numpy(TokenStore(data.store, "validation").ids(cli._spread(360, 4))).long()
    adapt = TokenAdapt((8, 8), crop=(7, 7), num_codes=64, width=64, heads=1, mlp=64)
    for model, side in ((None, 32), (adapt, 28)):
        rows, accuracies = naive_pictures(ids, tokenizer, model)
        assert len(rows) == 7 + 2 * bool(model) and len(accuracies) == 2 + 2 * bool(model)
        decoded = tokenizer.decode(ids)
        mirrored = decoded.flip(3)[..., :side, :side]  # the middle 7 of 8 tokens begin at the first
        assert torch.equal(rows["decoded tokens"], decoded)
        torch.testing.assert_close(rows["flip of the image"], mirrored)
        assert all(pictures.shape == (4, 3, side, side) for name, pictures in rows.items() if name in accuracies)
        if not model:
            true = tokenizer.encode(mirrored)
            assert torch.equal(rows["flip of the tokens"], tokenizer.decode(ids.flip(2)))
            assert torch.equal(rows["flip, then tokens"], tokenizer.decode(true))
            right = (ids.flip(2) == true).double().mean().item()
            assert accuracies["flip of the tokens"] == pytest.approx(100 * right) and right < 0.7


def test_show_refuses_tokens_that_cannot_be_flipped(two, tmp_path, monkeypatch, capsys):
    line = ["show", two, "--out", tmp_path / "picture.png"]
    assert "name the tokenizer with --tokenizer" in fails(monkeypatch, capsys, *line, "--augment")
    message = fails(monkeypatch, capsys, *line, "--augment", "--tokenizer", "any")
    assert "got the grid None" in message and "expected one square grid" in message
    assert "add --augment" in fails(monkeypatch, capsys, *line, "--tokenadapt", "any")
    line = [
        "show",
        digits().store,
        "--tokenizer",
        digits().tokenizer,
        "--augment",
        "--out",
        tmp_path / "picture.png",
    ]
    codebook = codebook_fingerprint(TokenStore(digits().store).codebook)
    adapt = TokenAdapt((4, 4), crop=(4, 4), num_codes=64, width=64, heads=1, mlp=64)
    save_pretrained(tmp_path / "adapt.safetensors", adapt, codebook)
    message = fails(monkeypatch, capsys, *line, "--tokenadapt", tmp_path / "adapt.safetensors")
    assert "for the grid (4, 4), expected (8, 8)" in message


def test_show_refuses_a_tokenizer_of_another_store(store, two, tmp_path, monkeypatch, capsys):
    """By the fingerprint where one is recorded, else by the codebook."""
    out = tmp_path / "picture.png"
    tokenizer = digits().tokenizer
    message = fails(monkeypatch, capsys, "show", store, "--tokenizer", tokenizer, "--out", out)
    assert re.search(r"got tokenizer [0-9a-f]{16}, expected 0123abcd0123abcd, ", message)
    message = fails(monkeypatch, capsys, "show", two, "--tokenizer", tokenizer, "--out", out)
    assert "another codebook" in message and not out.exists()


def test_show_refuses_what_it_cannot_write(two, tmp_path, monkeypatch, capsys):
    out = tmp_path / "picture.png"
    out.write_text("mine")
    assert "nothing is overwritten" in fails(monkeypatch, capsys, "show", two, "--out", out)
    assert out.read_text() == "mine"
    assert "ends in .png" in fails(monkeypatch, capsys, "show", two, "--out", tmp_path / "picture.gif")
    other = tmp_path / "other.png"
    assert "--count 0" in fails(monkeypatch, capsys, "show", two, "--out", other, "--count", 0)
    assert "no split 'test'" in fails(monkeypatch, capsys, "show", two, "--out", other, "--split", "test")


# recode


@pytest.mark.parametrize("codec", CODECS)
def test_recode_is_exact_there_and_back(store, tmp_path, monkeypatch, codec):
    """Everything but the payloads is the same; back again, every byte of the store is."""
    run(monkeypatch, "recode", store, tmp_path / "other", "--codec", codec)
    for split in SIZES:
        old, new = TokenStore(store, split), TokenStore(tmp_path / "other", split)
        ids, labels, columns = sample(split)
        assert new.codec.name == codec
        assert (new.ids(range(len(new))) == ids).all() and (new.labels == labels).all()
        assert new.columns == old.columns
        plain = datasets.load_from_disk(str(tmp_path / "other" / split))
        assert {name: plain[name][:] for name in columns} == columns
        assert plain["label"][:] == labels.tolist() and plain.features["label"].names == CLASSES
        for fact in ("splits", "grid", "class_names", "tokenizer"):
            assert getattr(new, fact) == getattr(old, fact)
        assert (new.codebook == old.codebook).all() and (new.counts == old.counts).all()
    run(monkeypatch, "recode", tmp_path / "other", tmp_path / "back", "--codec", "ans")
    assert contents(tmp_path / "back") == contents(store)


def test_plain_datasets_reads_a_recoded_store(store, tmp_path, monkeypatch):
    """Without seitpp: the escape code is read by hand."""
    run(monkeypatch, "recode", store, tmp_path / "other", "--codec", "escape")
    data = datasets.load_from_disk(str(tmp_path / "other"))
    assert list(data) == list(SIZES)
    for split in SIZES:
        assert [list(payload) for payload in data[split]["tokens"]] == sample(split)[0].reshape(-1, 24).tolist()


def test_recode_of_images_with_their_own_grids(two, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "recode", two, tmp_path / "other", "--codec", "escape")
    s = TokenStore(tmp_path / "other")
    assert s.grid is None and (s[1][0] == np.ones((4, 4))).all() and s[1][1] == 1
    capsys.readouterr()
    assert "grid" in fails(monkeypatch, capsys, "recode", two, tmp_path / "third", "--codec", "context")
    assert not (tmp_path / "third").exists()


def test_recode_refuses_to_lose_a_column_of_another_kind(two, tmp_path, monkeypatch, capsys):
    """Other programs may add columns, which a store's reader leaves alone."""
    (name,) = layout.shard_names(layout.read_document(two), "train")
    with pa.OSFile(str(two / name)) as file:
        table = pa.ipc.open_stream(file).read_all().append_column("score", pa.array([0.5, 1.5]))
    with pa.ipc.new_stream(str(two / name), table.schema) as stream:
        stream.write_table(table.combine_chunks())
    info = two / "train" / layout.DATASET_INFO
    features = {**json.loads(info.read_text())["features"], "score": {"dtype": "float64", "_type": "Value"}}
    info.write_text(json.dumps({"features": features}))
    relist(two, name, f"train/{layout.DATASET_INFO}")
    assert TokenStore(two)[1][1] == 1
    message = fails(monkeypatch, capsys, "recode", two, tmp_path / "other", "--codec", "escape")
    assert "columns that would be lost" in message and "score" in message and not (tmp_path / "other").exists()


def test_recode_refuses_an_existing_folder_and_an_unknown_codec(store, tmp_path, monkeypatch, capsys):
    before = contents(store)
    assert "nothing is overwritten" in fails(monkeypatch, capsys, "recode", store, store, "--codec", "packed")
    assert "invalid choice: 'zip'" in fails(monkeypatch, capsys, "recode", store, tmp_path / "x", "--codec", "zip")
    assert contents(store) == before and sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_recode_of_a_damaged_store_leaves_nothing(store, tmp_path, monkeypatch, capsys):
    damage(store, "validation")
    assert "image 3" in fails(monkeypatch, capsys, "recode", store, tmp_path / "other", "--codec", "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


# Released files, the hub


def test_export_and_import(store, tmp_path, monkeypatch, capsys):
    release, again = tmp_path / "release", tmp_path / "again"
    run(monkeypatch, "export-release", store, release)
    assert capsys.readouterr().out == f"{release}: train 50 images, validation 7 images\n"
    (release / "synonyms.json").write_text("{}")
    run(monkeypatch, "import-release", release, again, "--grid", 4, 6, "--codec", "packed")
    out = capsys.readouterr().out
    assert "synonyms.json: not read" in out and "train 50 images, validation 7 images" in out
    for split in SIZES:
        s = TokenStore(again, split)
        assert s.codec.name == "packed" and (s.ids(range(len(s))) == sample(split)[0]).all()
    assert "name the grid" in fails(monkeypatch, capsys, "import-release", release, tmp_path / "third")


def test_images_with_their_own_grids_are_not_exported(two, tmp_path, monkeypatch, capsys):
    assert "different grids" in fails(monkeypatch, capsys, "export-release", two, tmp_path / "release")


def test_the_hub_without_a_network(store, tmp_path, monkeypatch, capsys):
    assert "me/tokens on the hub" in fails(monkeypatch, capsys, "push", store, "me/tokens", "--private")
    assert "me/tokens on the hub" in fails(monkeypatch, capsys, "pull", "me/tokens", tmp_path / "pulled")


# What the system refuses


def refused(log: Path, *arguments: object, **more: object) -> tuple[int, list[str]]:
    """Exit status and lines of a command in a child: `most` bytes a file, or `stdout`, a descriptor."""
    resource = pytest.importorskip("resource")  # not on Windows

    def child() -> None:
        if "stdout" in more:
            sys.stdout = os.fdopen(more["stdout"], "w")
        if "most" in more:
            resource.setrlimit(resource.RLIMIT_FSIZE, (more["most"], more["most"]))
        sys.argv = ["seitpp", *map(str, arguments)]
        cli.main()

    log.unlink(missing_ok=True)
    return in_child(child, log), log.read_text().splitlines()


def test_a_file_that_cannot_be_written_is_named(store, tmp_path):
    """By every library that writes: here files of more than 400 bytes are refused, as on a full disk."""
    before, other = contents(store), tmp_path / "other"
    for words in (
        ["recode", store, other, "--codec", "packed"],
        ["merge", other, store],
        ["subset", store, other, "--classes", "digit"],
        ["export-release", store, other],
        ["show", store, "--out", other.with_suffix(".png")],
    ):
        status, lines = refused(tmp_path / "log", *words, most=400)
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), (words, lines)
        assert "other" in lines[0] and "File too large; allow larger files" in lines[0], (words, lines)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "store"], words
    assert contents(store) == before


def test_an_output_that_takes_nothing(store, tmp_path):
    status, lines = refused(tmp_path / "log", "info", store, stdout=os.open("/dev/full", os.O_WRONLY))
    assert (status, lines) == (2, ["error: standard output: No space left on device; make room on the disk"])
    read, write = os.pipe()
    os.close(read)
    assert refused(tmp_path / "log", "info", store, stdout=write) == (cli.UNREAD, [])


# The command line itself


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inf", "x"], "unknown command 'inf', expected one of info, .*; did you mean info?"),
        (["import"], "did you mean import-release"),
        (["recode", "a", "b", "--codex", "ans"], "unknown flag --codex; did you mean --codec?"),
        (["info", "--codec=ans", "x"], "unknown flag --codec; seitpp info --help"),
        (["info"], "arguments are required: STORE; seitpp info --help"),
        (["info", "a", "b"], "unrecognized arguments: b"),
        (["subset", "a", "b"], "one of the arguments --fraction --classes is required"),
        (
            ["subset", "a", "b", "--classes", "c", "--seed", "1"],
            "--seed and --split: got --classes",
        ),
        (["append", "nowhere", "elsewhere"], "nowhere: no such folder"),
        (["merge", "out", "nowhere"], "nowhere: no token store"),
        (["show", "a", "--out", "b.png", "--count", "many"], "invalid int value: 'many'"),
        (["info", "nowhere"], "nowhere: no token store"),
        (["info", "no\nwhere"], r"no\\nwhere: no token store"),
    ],
)
def test_what_is_mistyped_is_one_line(monkeypatch, capsys, arguments, message):
    assert re.search(message, fails(monkeypatch, capsys, *arguments))


def test_help_lists_every_command_and_the_docs_show_each(monkeypatch, capsys):
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit) as caught:
            run(monkeypatch, *arguments)
        assert caught.value.code == 0
        text = capsys.readouterr().out
        for command in cli._parsers()[1]:
            assert re.search(rf"^ +{command}\b", text, flags=re.MULTILINE)
            assert f"$ seitpp {command}" in (ROOT / "docs/cli.md").read_text()


def test_the_documented_commands_print_what_is_documented(tmp_path, monkeypatch, capsys):
    """In the folder of the digits, all that needs no network and no run. Numbers and fingerprints may differ."""
    shutil.copytree(digits().store.parent, tmp_path / "digits")
    monkeypatch.chdir(tmp_path / "digits")
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs/cli.md").read_text(), flags=re.DOTALL)
    examples = [example for block in blocks for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    ran = 0
    for example in examples:
        command, _, documented = example.partition("\n")
        words = shlex.split(command)
        if words[0] != "seitpp" or words[1] in ("export-model", "push", "pull", "doctor"):
            continue
        try:
            run(monkeypatch, *words[1:])
        except SystemExit as stop:
            assert stop.code == 2, command
        assert shape("".join(capsys.readouterr())) == shape(documented), command
        ran += 1
    assert ran >= 8


def shape(text: str) -> list[str]:
    """The words of a text; paths without their folders, and one placeholder for numbers and fingerprints."""
    names = re.sub(r"\S*/", "", text)
    return re.sub(r"[0-9a-f]{12,}|\d[\d.,]*", "#", names).split()
