"""All that only a GPU can tell, by one command: under 8 minutes on an H100.

    python tests/bench/gpu.py --out gpu.json          # prints the table of docs/results.md; the same as JSON
    python tests/bench/gpu.py --only compiled resume  # some rows, which share the 8 minutes
    python tests/bench/gpu.py --small                 # every row tiny, in a minute, without a GPU too

The recipes themselves run, on random tokens of the published shape (32 x 32, K = 391) with random weights; what
they log is read, and what they hold is measured. A row that fails or is late costs no other row anything, and
keeps what it has measured.
"""

import argparse
import json
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from rows import FORK, HEADER, Bench, Lines, apart, losses_of, open_recipe, rate, seconds_of, table_lines, train

from seitpp import StoreWriter
from seitpp.codebook import codebook_fingerprint
from seitpp.data.digits import digits
from seitpp.engine.memory import Footprint, footprint
from seitpp.engine.metrics import MATMUL_SIDE, matmul_rate
from seitpp.engine.probe import knn, linear_probe
from seitpp.engine.system import device_name, git_commit, peak_memory
from seitpp.errors import UserError
from seitpp.images.batches import DecodedImages
from seitpp.images.sources import open_source
from seitpp.models import MTM, TokenAdapt, load_mtm, save_classifier
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.objectives import MASK_RATIOS
from seitpp.tokenizers import ViTVQGAN
from seitpp.tokenizers.encoding import encode

ROOT = Path(__file__).parents[2]
RECIPES, BENCH = ROOT / "recipes", ROOT / "tests/bench"

SECONDS = 480  # of all rows
IMAGENET, EPOCHS = 1_281_167, 400
DROPOUT = {"mtm_pretrain": "--dropout", "seit_train": "--drop-path", "finetune": "--drop-path"}


def setup(at: Bench) -> Lines:
    """The device; and what the other rows read: digits, tokens, models, photographs."""
    device = Accelerator().device
    if device.type != "cuda" and not at.small:
        raise UserError(f"no CUDA device here ({device_name(device)}): --small runs every row, tiny, without one")
    rates = {str(dtype)[6:]: matmul_rate(device, dtype) / 1e12 for dtype in (torch.float32, torch.bfloat16)}
    yield device_name(device), {f"{name} TFLOP/s": rate for name, rate in rates.items()}
    digits()
    rng, classes = np.random.default_rng(0), at.of(1000, 8)
    codebook = rng.standard_normal((391, 32)).astype(np.float32)
    known = codebook_fingerprint(codebook)
    for split, images in (("train", at.of(16384, 64)), ("validation", classes)):
        with StoreWriter(at.folder / "tokens", codebook=codebook, grid=(32, 32), split=split) as writer:
            ids = rng.integers(391, size=(images, 32, 32), dtype=np.uint16)
            writer.add_batch(ids, np.arange(images) % classes)
    adapt = TokenAdapt(**at.of({}, {"width": 64, "heads": 1, "mlp": 64}))
    torch.nn.init.normal_(adapt.head.weight)  # else all codes are equally likely
    save_pretrained(at.folder / "adapt.safetensors", adapt, known)
    tiny = {"encoder": "mtm_vit_nano", "decoder_width": 96, "decoder_depth": 2, "decoder_heads": 4}
    model = MTM(**at.of({}, tiny))
    save_pretrained(at.folder / "mtm.safetensors", model, known)
    model = timm.create_model(at.of("seit_vit_base", "seit_vit_nano"), num_classes=classes)
    save_classifier(at.folder / "seit.safetensors", model, known, class_names=None)
    make_images = runpy.run_path(str(BENCH / "tokenize_images.py"))["make_images"]
    for label in ("0", "1"):
        folder = at.folder / "photographs" / label
        folder.mkdir(parents=True)
        make_images(folder, at.of(512, 12))


def published(at: Bench, recipe: str) -> list:
    """A recipe's published preset on what `setup` made."""
    nano = ["--model", "mtm_vit_nano", "--decoder-width", 96, "--decoder-depth", 2, "--decoder-heads", 4]
    adapt = ["--tokenadapt", at.folder / "adapt.safetensors"]
    words = {
        "mtm_pretrain": [*adapt, *at.of([], nano)],
        "seit_train": at.of([], ["--model", "seit_vit_nano"]),
        "finetune": [*adapt, "--checkpoint", at.folder / "mtm.safetensors"],
    }
    return ["published", "--store", at.folder / "tokens", *words[recipe]]


def presets(at: Bench) -> Lines:
    """The first loss of the published presets on a CPU and on the device, by one seed in float32."""
    for recipe, dropout in DROPOUT.items():  # a device draws it otherwise
        words = [*published(at, recipe), "--precision", "no", "--no-compile", "--workers", 0, dropout, 0]
        losses = []
        for cpu in ("1", "0"):
            with patch_environment(ACCELERATE_USE_CPU=cpu):
                trained = train(at, recipe, *words, "--batch-size", 8, "--log-steps", 1, steps=1)
            losses.append(trained.records[0]["loss"])
        difference = abs(losses[1] / losses[0] - 1)
        yield f"{recipe} published", {"loss": losses[1], "on a CPU": losses[0], "relative difference": difference}


def mtm_step(at: Bench, words: list, batch: int) -> dict[str, float]:
    """What `rate` gives, and the share of the run's view in a step."""
    figures, held = rate(at, "mtm_pretrain", words, batch)
    with held["run"].accelerator.autocast():
        seconds = seconds_of(lambda: held["view"](held["batch"].ids, held["keys"]), at.of(20, 1))
    return {**figures, "view %": 100 * seconds * figures["images/s"] / batch}


def mtm(at: Bench) -> Lines:
    """The published step, not compiled, and what an image more takes of the memory."""
    words, batch, peaks = published(at, "mtm_pretrain"), at.of(256, 8), {}
    yield f"TokenAdapt, batch {batch}", mtm_step(at, [*words, "--no-compile"], batch)
    plain = ["plain", *words[1:], "--tokenadapt", "None", "--no-compile"]
    for batch in at.of((64, 128, 256, 512), (8, 16)):
        figures = mtm_step(at, plain, batch)
        peaks[batch] = figures["peak GiB"]
        yield f"plain, batch {batch}", figures
    (few, before), (many, after) = list(peaks.items())[-2:]
    count, slope = counted_memory(at), 1024 * (after - before) / (many - few)
    figures = {"measured": slope, "peak by count": count.peak / 2**20, "saved by count": count.saved / 2**20}
    yield f"MiB an image, from batch {few} to {many}", figures


def counted_memory(at: Bench) -> Footprint:
    """Of the plain step."""
    model, law, *_ = load_mtm(at.folder / "mtm.safetensors")[0], MASK_RATIOS["seitpp"]
    counts = law.counts(model.encoder.patch_embed.num_patches, law.highest)
    trial = open_recipe("mtm_pretrain").zeros_loss((28, 28), counts, 0.0)
    return footprint(trial, at.of("bf16", "no"), model)


def compiled(at: Bench) -> Lines:
    """The published preset as it is, model and view compiled; in small only as far as torch's compiler."""
    if at.small:
        torch.compiler.set_stance("force_eager")
    batch = at.of(256, 8)
    yield f"TokenAdapt, batch {batch}", mtm_step(at, published(at, "mtm_pretrain"), batch)


def others(at: Bench) -> Lines:
    """What else is trained, not compiled."""
    pixels = ["pixels", "--checkpoint", at.folder / "seit.safetensors", "--data", at.folder / "photographs"]
    batch = at.of(256, 8)
    for name, recipe, words in (
        ("seit_train published", "seit_train", published(at, "seit_train")),
        ("finetune published", "finetune", published(at, "finetune")),
        ("finetune pixels", "finetune", [*pixels, "--split", "None", "--validation-split", "None"]),
    ):
        yield f"{name}, batch {batch}", rate(at, recipe, [*words, "--no-compile"], batch)[0]


def tokenize(at: Bench) -> Lines:
    """ViT-VQGAN base: decoded images alone, then the recipe, from JPEG to a store."""
    recipe, accelerator = open_recipe("tokenize_images"), Accelerator()
    tokenizer = (
        ViTVQGAN.new(**at.of({"size": "base"}, {"size": "small", "image_size": 64})).to(accelerator.device).eval()
    )
    source, batch = open_source(str(at.folder / "photographs"), None), at.of(256, 4)
    decoded = DecodedImages(source, tokenizer.spec.image_size).__getitems__(list(range(batch)))

    def forward() -> torch.Tensor:
        return torch.from_numpy(encode(tokenizer, decoded, accelerator.device)[0].astype(np.int32))

    yield f"ViT-VQGAN, batch {batch}", {"images/s": batch / seconds_of(forward, at.of(4, 1))}
    settings = {"out": str(at.folder / "tokenized"), "batch_size_per_process": batch, "workers": at.of(16, 0)}
    with redirect_stdout(StringIO()) as printed:
        recipe.tokenize(source, tokenizer, replace(recipe.PRESETS["published"], **settings), accelerator)
    images_per_second = float(re.search(r"([\d.]+) images/s", printed.getvalue())[1])
    yield f"tokenize_images, {len(source):,} photographs", {"images/s": images_per_second}


def probing(at: Bench) -> Lines:
    """The linear probe and k-NN on features as wide as those of ViT-B."""
    accelerator, bench = Accelerator(), runpy.run_path(str(BENCH / "probe.py"))
    images, queries, iterations = at.of((100_000, 5_000, 200), (512, 64, 1))
    bank, asked = bench["synthetic"](images, queries, accelerator.device)
    for name, judge, more in (("k-NN", knn, {}), ("linear probe", linear_probe, {"max_iterations": iterations})):
        bank.vectors.sum().item()
        start = time.perf_counter()
        score = judge(bank, asked, num_classes=bench["CLASSES"], accelerator=accelerator, **more)
        yield f"{name}, {images:,} x 1,536", {"seconds": time.perf_counter() - start, "top-1 %": score.percent}
    count = bench["peak_bytes"](images, queries, bench["WIDTH"], bench["CLASSES"])
    yield "memory", {"peak GiB": peak_memory(accelerator.device) / 2**30, "by count": count / 2**30}


def precisions(at: Bench) -> Lines:
    """Losses of the same updates on the digits."""
    updates, exact = at.of(200, 4), []
    for precision in ("no", "bf16", "fp16"):
        words = ["digits", *at.of([], ["--batch-size", 16]), "--precision", precision, "--log-steps", updates // 4]
        losses = [record["loss"] for record in train(at, "mtm_pretrain", *words, steps=updates).records]
        exact = exact or losses
        figures = {f"loss {n}": losses[n - 1] for n in (1, updates // 4, updates // 2, updates)}
        differences = [abs(loss / other - 1) for loss, other in zip(losses, exact, strict=True)]
        yield f"--precision {precision}", {**figures, "mean relative difference": mean(differences)}


def fsdp(at: Bench) -> Lines:
    """A run of a few updates under FSDP 2 on one device."""
    out, on_cpu = at.folder / "fsdp", not torch.cuda.is_available()
    launcher = ["accelerate.commands.launch", "--config_file", RECIPES / "accelerate/fsdp.yaml"]
    launcher += ["--num_processes", 1, "--main_process_port", 0]
    script = [*([ROOT / "tests/support/fsdp_on_cpu.py"] if on_cpu else []), RECIPES / "seit_train.py", "smoke"]
    words = ["--epochs", 0.5, "--warmup-epochs", 0.2, "--precision", at.of("bf16", "no"), "--out", out]
    with patch_environment(**({"ACCELERATE_USE_CPU": "1"} if on_cpu else {})):
        subprocess.run([sys.executable, "-m", *map(str, [*launcher, *script, *words])], check=True)
    losses = losses_of(out)
    yield "seit_train smoke", {"updates": len(losses), "first loss": losses[0], "last loss": losses[-1]}


def resume(at: Bench) -> Lines:
    """The same 12 updates twice, and killed and resumed, every time in a new process."""
    words = ["smoke", "--crop-size", 8, "--batch-size", 32, "--checkpoint-epochs", 0.1, "--resume"]
    words += ["--precision", at.of("bf16", "no")]
    once, again, killed = (at.folder / name for name in ("once", "again", "killed"))
    for out, kill in ((once, None), (again, None), (killed, 7), (killed, None)):  # checkpoints at 4, 8, 12
        named = {"steps": 12, "out": out, "kill": kill}
        process = FORK.Process(target=train, args=(at, "mtm_pretrain", *words), kwargs=named)
        process.start()
        process.join()
        if process.exitcode != (-signal.SIGKILL if kill else 0):
            raise RuntimeError(f"the run in {out.name} ended with {process.exitcode}")
        if kill:
            resumed = (out / "checkpoints/LATEST").read_text()
    for name, out in (("again", again), (f"killed after 7, resumed from {resumed}", killed)):
        states = [
            [(run / "checkpoints/step-00000012" / file).read_bytes() for run in (once, out)]
            for file in ("model.safetensors", "optimizer.safetensors")
        ]
        difference = max(abs(a - b) for a, b in zip(losses_of(once), losses_of(out), strict=True))
        same = all(here == there for here, there in states)
        yield name, {"same bits": same, "largest difference of a loss": difference}


# The rows, and what share of the time that is left each may take; what it does not take is there for the others.
ROWS = {presets: 50, mtm: 70, others: 50, tokenize: 30, probing: 20, precisions: 40, fsdp: 30, resume: 35}
ROWS |= {compiled: 125}


def goals(step: dict[str, float]) -> Lines:
    """What the compiled published step should reach, and what its rate makes of the whole run."""
    hours = f"hours of {EPOCHS} epochs of ImageNet-1k"
    measured = {**step, hours: EPOCHS * IMAGENET / step["images/s"] / 3600}
    least, less = {"MFU": 0.5, "MFU by data sheet": 0.5}, {"view %": 5, "data wait %": 1, hours: 24}
    for name, limit in least.items():
        if name in measured:
            yield f"{name}, at least {limit}", {"measured": measured[name], "met": measured[name] >= limit}
    for name, limit in less.items():
        yield f"{name}, under {limit}", {"measured": measured[name], "met": measured[name] < limit}


def measure(shares: dict[Callable[[Bench], Lines], float], small: bool) -> dict[str, dict[str, Any]]:
    """Rows and their shares of the time, one after the other, then the goals; each is printed when it is there.
    Ends the program where `setup` fails.
    """
    rows, rest, end = {}, sum(shares.values()), time.monotonic() + SECONDS
    with tempfile.TemporaryDirectory(prefix="seitpp-gpu-") as folder:
        for row, share in shares.items():
            found = apart(row, Bench(Path(folder), small), (end - time.monotonic()) * share / rest)
            rest -= share
            print(f"{row.__name__}: {found['seconds']:.0f} s {found['error'] or ''}", file=sys.stderr, flush=True)
            if row is setup and found["error"]:
                sys.exit(2)
            rows[row.__name__] = found
            print(HEADER * (row is setup) + table_lines(row.__name__, found), end="", flush=True)
    for step in rows.get("compiled", {"lines": {}})["lines"].values():
        rows["goals"] = {"lines": dict(goals(step)), "seconds": 0.0, "error": None}
        print(table_lines("goals", rows["goals"]), end="")
    return rows


def main() -> None:
    named = {row.__name__: row for row in ROWS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON: all figures, and the log of a row that failed")
    parser.add_argument("--small", action="store_true", help="every row tiny, on a CPU too")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=named, default=named, help=", ".join(named))
    given = parser.parse_args()
    if given.small:
        MATMUL_SIDE["cpu"] = 256
    rows = measure({setup: 30} | {named[name]: ROWS[named[name]] for name in given.only}, given.small)
    if given.out:
        origin = {"small": given.small, "torch": torch.__version__, "git_commit": git_commit()}
        given.out.write_text(json.dumps({**origin, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
