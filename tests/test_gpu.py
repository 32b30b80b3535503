"""What a GPU would refuse or wait for, seen on a CPU: every recipe on a device of pretend_gpu.py."""

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from support.paths import RECIPES, ROOT, SUPPORT
from support.pictures import write

from downstream.segmentation.default import FEW_SCENES, default_scenes
from seitpp import StoreWriter, TokenStore
from seitpp.codebook import codebook_fingerprint
from seitpp.data.digits import DigitsSource, digits
from seitpp.engine.folder import unknown_files
from seitpp.models import MTM, TokenAdapt, save_classifier
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.tokenizers import TokenizerSpec, ViTVQGAN
from seitpp.tokenizers.transformer import TransformerShape

SHORT = ["smoke", "--precision", "bf16", "--epochs"]


def pretend(jobs: list[tuple[str, list]], *flags: str) -> list[dict]:
    """The reports of `jobs`, (recipe, arguments), run one after the other by one process."""
    lines = json.dumps([[recipe, [str(word) for word in words]] for recipe, words in jobs])
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "pretend_gpu.py"), *flags],
        input=lines,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(RECIPES)])},
        timeout=1200,
    )
    reports = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("report ")]
    assert len(reports) == len(jobs), done.stderr[-3000:]
    return reports


def problems(reports: list[dict]) -> list[str]:
    """Faults and errors of all reports, and whatever in a step the host waits for."""
    return [
        f"{report['recipe']} {report['arguments'][0]}: {problem}"
        for report in reports
        for problem in (*filter(None, [report["error"]]), *report["faults"], *report["waits"], *report["copies"])
    ]


def few_digits(folder: Path) -> tuple[Path, Path]:
    """A store with the tokenizer beside it, and a folder of pictures: enough for two batches each."""
    store, pictures, known = folder / "few", folder / "pictures", digits()
    for split, images in (("train", 256), ("validation", 32)):
        whole = TokenStore(known.store, split)
        chosen = np.linspace(0, len(whole) - 1, images).astype(int)  # of all classes
        common = {"codebook": whole.codebook, "grid": whole.grid, "class_names": whole.class_names}
        with StoreWriter(store, split=split, **common) as writer:
            writer.add_batch(whole.ids(chosen), whole.labels[chosen])
    shutil.copy(known.tokenizer, f"{store}-tokenizer.safetensors")
    for index in range(40):
        write(pictures / f"{index:02d}.png", DigitsSource("train").read(index).data)
    return store, pictures


def test_every_recipe_from_its_first_step_to_its_result(tmp_path: Path) -> None:
    """Training steps, checkpoints, evaluations, files and pictures, with numbers."""
    few, some = few_digits(tmp_path)
    tokens, images = ["--store", few], ["--data", some, "--tokenizer", digits().tokenizer]
    two = ["--batch-size", 2]  # a CPU is slow at convolutions in bf16
    adapt, mtm, fine, segment = (tmp_path / name for name in ("adapt", "mtm", "fine", "segment"))
    through, half = ["--tokenadapt", adapt, "--tokenadapt-fraction", 0.5], ["smoke", "--precision", "bf16"]
    mixed, scenes = ["--color", "seitpp", "--mixup", 0.8], default_scenes(FEW_SCENES)  # those of the preset smoke
    two_steps, few_rows = ["--epochs", 2 / 11, "--warmup-epochs", 0], ["--seeds", 1, "--budgets"]
    few_rows += ["--uniform", "--resolution", "--jpeg-quality", 1, "--token-fractions", "--crops"]
    pictures = ["--data", scenes.images / "images/validation", "--tokenizer", scenes.tokenizer]
    jobs = [
        ("tokenadapt_train", [*SHORT, 1, "--out", adapt, *images, "--batch-size", 16]),
        ("mtm_pretrain", [*SHORT, 1, "--out", mtm, *tokens, "--crop-size", 8, *through, "--color", "coloradapt"]),
        ("finetune", [*SHORT, 1, "--out", fine, "--checkpoint", mtm, *tokens, *through, *mixed]),
        ("seit_train", [*SHORT, 1, "--out", tmp_path / "seit", *tokens, *through, *mixed]),
        ("tokenize_images", ["smoke", "--out", tmp_path / "tokens", "--compact"]),
        ("tokenizer_train", [*SHORT, 0.1, "--out", tmp_path / "tokenizer", *images[:2], *two, "--adversarial"]),
        ("segment_ade20k", [*half, "--out", segment, "--steps", 2, "--warmup-steps", 1, *two]),
        ("probe", ["smoke", "--out", tmp_path / "probe", "--checkpoint", mtm, *tokens]),
        ("inpaint", ["smoke", "--out", tmp_path / "inpaint", "--checkpoint", mtm, *tokens]),
        ("evaluate", ["smoke", "--out", tmp_path / "evaluate", "--checkpoint", fine, *tokens]),
        ("robustness", ["smoke", "--out", tmp_path / "robustness", "--checkpoint", fine]),
        ("evaluate_segmentation", ["smoke", "--out", tmp_path / "scenes", "--checkpoint", segment]),
        ("embed", [*half, "--out", tmp_path / "vectors", "--checkpoint", mtm, *images]),
        ("predict", [*half, "--out", tmp_path / "classes", "--checkpoint", fine, *images]),
        ("predict", [*half, "--out", tmp_path / "masks", "--checkpoint", segment, *pictures]),
        ("continual", [*half, "--out", tmp_path / "tasks", *tokens, "--fraction", 1, "--tasks", 2]),
        ("finetune", ["deit_digits", "--precision", "bf16", *two_steps, "--out", tmp_path / "pixels"]),
        ("storage_tradeoff", [*half, *few_rows, "--out", tmp_path / "tradeoff"]),
    ]
    reports = pretend(jobs)
    assert not problems(reports)
    assert [report["steps"] for report in reports[:4]] == [2] * 4 and reports[5]["steps"] == 2
    outs = {words[words.index("--out") + 1] for _, words in jobs}
    assert all(unknown_files(out) == [] for out in outs - {tmp_path / "tokens"}), "--overwrite would refuse them"
    assert (tmp_path / "tokens/tokens.json").is_file()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What people with a GPU have: tokens of the published shape with and without annotations, images, and models
    of the published sizes.
    """
    folder, generator = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    shape = TransformerShape(64, 1, 1, 256)
    tokenizer = ViTVQGAN(TokenizerSpec("vit_vqgan", (256, 256), 8, num_codes=391, code_dim=32), shape, shape)
    tokenizer.save(folder / "tokenizer.safetensors")
    codebook = tokenizer.codebook.detach().numpy()
    fingerprint = codebook_fingerprint(codebook)
    save_pretrained(folder / "adapt.safetensors", TokenAdapt(), fingerprint)
    save_pretrained(folder / "mtm.safetensors", MTM(), fingerprint)
    model = timm.create_model("seit_vit_base", num_classes=8)
    save_classifier(folder / "seit.safetensors", model, fingerprint, class_names=None)
    png = io.BytesIO()
    Image.fromarray(generator.integers(9, size=(512, 512), dtype=np.uint8)).save(png, "png")
    for name, side in (("tokens", 32), ("ade20k", 64)):
        for split in ("train", "validation"):
            with StoreWriter(
                folder / name,
                codebook=codebook,
                grid=(side, side),
                split=split,
                class_names=[str(label) for label in range(8)],
                tokenizer=tokenizer.description(),
                columns={"annotation": "binary"} if name == "ade20k" else {},
            ) as writer:
                for label in range(32):
                    ids = generator.integers(391, size=(side, side), dtype=np.uint16)
                    writer.add(ids, label % 8, {"annotation": png.getvalue()} if name == "ade20k" else {})
    for index in range(24):
        path = folder / "images" / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(300, 400, 3), dtype=np.uint8)).save(path)
    return folder


def published_jobs(folder: Path, out: Path) -> list[tuple[str, list]]:
    """Every preset of every training recipe that is meant for a GPU, at a batch of 8.

    Those that differ from another one only in the size of the network are left out.
    """
    adapt, images = ["--tokenadapt", folder / "adapt.safetensors"], ["--data", folder / "images"]
    tokenizer = ["--tokenizer", folder / "tokenizer.safetensors"]
    needs = {
        "mtm_pretrain": ["--store", folder / "tokens"],
        "seit_train": ["--store", folder / "tokens"],
        "finetune": ["--store", folder / "tokens", "--checkpoint", folder / "mtm.safetensors"],
        "tokenadapt_train": [*images, *tokenizer],
        "tokenizer_train": images,
        "segment_ade20k": ["--store", folder / "ade20k"],
        # One task, since there is an evaluation after each, which needs numbers.
        "continual": ["--store", folder / "tokens", "--tasks", 1],
    }
    finetunes = {
        "tokens": ["--store", folder / "tokens", "--checkpoint", folder / "seit.safetensors"],
        "pixels": [
            *images,
            "--split",
            "None",
            "--validation-split",
            "None",
            "--checkpoint",
            folder / "seit.safetensors",
        ],
    }
    whole = [*images, "--split", "None", "--validation-split", "None"]
    finetunes |= dict.fromkeys(("deit_base", "resnet50"), whole)
    jobs = []
    for recipe, arguments in needs.items():
        presets = importlib.import_module(recipe).PRESETS
        for name in presets.keys() - {"digits", "smoke", "photos", "scenes", "dct", "features", "deit_digits"}:
            if name.endswith(("small", "resnet18")):
                continue
            words = finetunes.get(name, arguments) if recipe == "finetune" else arguments
            through = adapt if getattr(presets[name], "tokenadapt_fraction", 0) else []
            flags = ["--batch-size", 8, "--no-compile", "--workers", 0, "--out", out / f"{recipe}-{name}"]
            jobs.append((recipe, [name, *words, *through, *flags]))
    return jobs


def test_two_steps_of_every_published_preset(stranger: Path, tmp_path: Path) -> None:
    reports = pretend(published_jobs(stranger, tmp_path), "--shapes")
    assert not problems(reports)
    assert len(reports) > 20 and {report["steps"] for report in reports} == {2}


def test_a_compiled_view_is_one_graph() -> None:
    done = subprocess.run([sys.executable, str(SUPPORT / "compiled_views.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
