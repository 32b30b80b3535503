"""Measure everything that needs a GPU with one command, in under 8 minutes on an H100.

    python tests/bench/gpu.py --out gpu.json          # prints the table of docs/results.md, and writes it as JSON
    python tests/bench/gpu.py --only compiled resume  # only these rows, which share the 8 minutes
    python tests/bench/gpu.py --small                 # every row tiny, in a minute, also without a GPU

The recipes themselves run, with random weights on random tokens of the published shape (32 x 32, K = 391). The
figures come from their logs and from measurements of their objects. A row that fails or takes too long does not
affect the other rows, and keeps what it has measured.
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

SECONDS = 480  # for all rows together
IMAGENET, EPOCHS = 1_281_167, 400
DROPOUT = {"mtm_pretrain": "--dropout", "seit_train": "--drop-path", "finetune": "--drop-path"}


def setup(bench: Bench) -> Lines:
    """Measure the device's matrix products; create the files of the other rows: tokens, models, photographs."""
    device = Accelerator().device
    if device.type != "cuda" and not bench.small:
        raise UserError(f"no CUDA device here ({device_name(device)}): --small runs every row, tiny, without one")
    rates = {str(dtype)[6:]: matmul_rate(device, dtype) / 1e12 for dtype in (torch.float32, torch.bfloat16)}
    yield device_name(device), {f"{name} TFLOP/s": rate for name, rate in rates.items()}
    digits()
    rng, classes = np.random.default_rng(0), bench.pick(1000, 8)
    codebook = rng.standard_normal((391, 32)).astype(np.float32)
    fingerprint = codebook_fingerprint(codebook)
    for split, images in (("train", bench.pick(16384, 64)), ("validation", classes)):
        with StoreWriter(bench.folder / "tokens", codebook=codebook, grid=(32, 32), split=split) as writer:
            ids = rng.integers(391, size=(images, 32, 32), dtype=np.uint16)
            writer.add_batch(ids, np.arange(images) % classes)
    adapt = TokenAdapt(**bench.pick({}, {"width": 64, "heads": 1, "mlp": 64}))
    torch.nn.init.normal_(adapt.head.weight)  # otherwise all codes are equally likely
    save_pretrained(bench.folder / "adapt.safetensors", adapt, fingerprint)
    tiny = {"encoder": "mtm_vit_nano", "decoder_width": 96, "decoder_depth": 2, "decoder_heads": 4}
    model = MTM(**bench.pick({}, tiny))
    save_pretrained(bench.folder / "mtm.safetensors", model, fingerprint)
    model = timm.create_model(bench.pick("seit_vit_base", "seit_vit_nano"), num_classes=classes)
    save_classifier(bench.folder / "seit.safetensors", model, fingerprint, class_names=None)
    make_images = runpy.run_path(str(BENCH / "tokenize_images.py"))["make_images"]
    for label in ("0", "1"):
        folder = bench.folder / "photographs" / label
        folder.mkdir(parents=True)
        make_images(folder, bench.pick(512, 12))


def published(bench: Bench, recipe: str) -> list:
    """Return the arguments of a recipe's published preset with the files that `setup` created."""
    nano = ["--model", "mtm_vit_nano", "--decoder-width", 96, "--decoder-depth", 2, "--decoder-heads", 4]
    adapt = ["--tokenadapt", bench.folder / "adapt.safetensors"]
    arguments = {
        "mtm_pretrain": [*adapt, *bench.pick([], nano)],
        "seit_train": bench.pick([], ["--model", "seit_vit_nano"]),
        "finetune": [*adapt, "--checkpoint", bench.folder / "mtm.safetensors"],
    }
    return ["published", "--store", bench.folder / "tokens", *arguments[recipe]]


def presets(bench: Bench) -> Lines:
    """Compare the first loss of the published presets on the CPU and on the device, with one seed in float32."""
    for recipe, dropout in DROPOUT.items():  # off, because devices sample it differently
        arguments = [*published(bench, recipe), "--precision", "no", "--no-compile", "--workers", 0, dropout, 0]
        losses = []
        for cpu in ("1", "0"):
            with patch_environment(ACCELERATE_USE_CPU=cpu):
                trained = train(bench, recipe, *arguments, "--batch-size", 8, "--log-steps", 1, steps=1)
            losses.append(trained.records[0]["loss"])
        difference = abs(losses[1] / losses[0] - 1)
        yield f"{recipe} published", {"loss": losses[1], "on a CPU": losses[0], "relative difference": difference}


def mtm_step(bench: Bench, arguments: list, batch: int) -> dict[str, float]:
    """Return the figures of `rate`, and the augmentation's time in percent of a step."""
    figures, variables = rate(bench, "mtm_pretrain", arguments, batch=batch)
    with variables["run"].accelerator.autocast():
        seconds = seconds_of(
            lambda: variables["view"](variables["batch"].ids, variables["keys"]), bench.pick(20, 1)
        )
    return {**figures, "view %": 100 * seconds * figures["images/s"] / batch}


def mtm(bench: Bench) -> Lines:
    """Measure the published step, not compiled, and the additional memory per image."""
    arguments, batch, peaks = published(bench, "mtm_pretrain"), bench.pick(256, 8), {}
    yield f"TokenAdapt, batch {batch}", mtm_step(bench, [*arguments, "--no-compile"], batch)
    plain = ["plain", *arguments[1:], "--tokenadapt", "None", "--no-compile"]
    for batch in bench.pick((64, 128, 256, 512), (8, 16)):
        figures = mtm_step(bench, plain, batch)
        peaks[batch] = figures["peak GiB"]
        yield f"plain, batch {batch}", figures
    (few, before), (many, after) = list(peaks.items())[-2:]
    count, slope = counted_memory(bench), 1024 * (after - before) / (many - few)
    figures = {"measured": slope, "peak by count": count.peak / 2**20, "saved by count": count.saved / 2**20}
    yield f"MiB per image, from batch {few} to {many}", figures


def counted_memory(bench: Bench) -> Footprint:
    """Compute the memory of the plain step without running it."""
    model, mask_ratio = load_mtm(bench.folder / "mtm.safetensors")[0], MASK_RATIOS["seitpp"]
    counts = mask_ratio.counts(model.encoder.patch_embed.num_patches, mask_ratio.highest)
    trial = open_recipe("mtm_pretrain").zeros_loss((28, 28), counts, 0.0)
    return footprint(trial, bench.pick("bf16", "no"), model)


def compiled(bench: Bench) -> Lines:
    """Measure the unchanged published preset: model and augmentation compiled, except with --small."""
    if bench.small:
        torch.compiler.set_stance("force_eager")
    batch = bench.pick(256, 8)
    yield f"TokenAdapt, batch {batch}", mtm_step(bench, published(bench, "mtm_pretrain"), batch)


def others(bench: Bench) -> Lines:
    """Measure training and fine-tuning of classifiers, not compiled."""
    pixels = ["pixels", "--checkpoint", bench.folder / "seit.safetensors", "--data", bench.folder / "photographs"]
    batch = bench.pick(256, 8)
    for name, recipe, arguments in (
        ("seit_train published", "seit_train", published(bench, "seit_train")),
        ("finetune published", "finetune", published(bench, "finetune")),
        ("finetune pixels", "finetune", [*pixels, "--split", "None", "--validation-split", "None"]),
    ):
        yield f"{name}, batch {batch}", rate(bench, recipe, [*arguments, "--no-compile"], batch=batch)[0]


def tokenize(bench: Bench) -> Lines:
    """Measure ViT-VQGAN base on decoded images alone, then the recipe from JPEG files to a store."""
    recipe, accelerator = open_recipe("tokenize_images"), Accelerator()
    sizes = bench.pick({"size": "base"}, {"size": "small", "image_size": 64})
    tokenizer = ViTVQGAN.new(**sizes).to(accelerator.device).eval()
    source, batch = open_source(str(bench.folder / "photographs"), None), bench.pick(256, 4)
    decoded = DecodedImages(source, tokenizer.spec.image_size).__getitems__(list(range(batch)))

    def forward() -> torch.Tensor:
        return torch.from_numpy(encode(tokenizer, decoded, accelerator.device)[0].astype(np.int32))

    yield f"ViT-VQGAN, batch {batch}", {"images/s": batch / seconds_of(forward, bench.pick(4, 1))}
    settings = {
        "out": str(bench.folder / "tokenized"),
        "split": "train",
        "batch_size_per_process": batch,
        "workers": bench.pick(16, 0),
    }
    with redirect_stdout(StringIO()) as printed:
        config = replace(recipe.PRESETS["published"], **settings)
        recipe.tokenize(source, tokenizer, config=config, first=True, target=None, accelerator=accelerator)
    images_per_second = float(re.search(r"([\d.]+) images/s", printed.getvalue())[1])
    yield f"tokenize_images, {len(source):,} photographs", {"images/s": images_per_second}


def probing(bench: Bench) -> Lines:
    """Measure linear probe and k-NN on features as wide as those of ViT-B."""
    accelerator, synthetic = Accelerator(), runpy.run_path(str(BENCH / "probe.py"))
    images, queries, iterations = bench.pick((100_000, 5_000, 200), (512, 64, 1))
    bank, validation = synthetic["synthetic"](images, queries, accelerator.device)
    for name, evaluate, more in (
        ("k-NN", knn, {}),
        ("linear probe", linear_probe, {"max_iterations": iterations}),
    ):
        bank.vectors.sum().item()
        start = time.perf_counter()
        score = evaluate(bank, validation, num_classes=synthetic["CLASSES"], accelerator=accelerator, **more)
        yield f"{name}, {images:,} x 1,536", {"seconds": time.perf_counter() - start, "top-1 %": score.percent}
    count = synthetic["peak_bytes"](images, queries, width=synthetic["WIDTH"], classes=synthetic["CLASSES"])
    yield "memory", {"peak GiB": peak_memory(accelerator.device) / 2**30, "by count": count / 2**30}


def precisions(bench: Bench) -> Lines:
    """Compare the losses of the same updates on the digits in each precision."""
    updates, exact = bench.pick(200, 4), []
    for precision in ("no", "bf16", "fp16"):
        arguments = [
            "digits",
            *bench.pick([], ["--batch-size", 16]),
            "--precision",
            precision,
            "--log-steps",
            updates // 4,
        ]
        losses = [record["loss"] for record in train(bench, "mtm_pretrain", *arguments, steps=updates).records]
        exact = exact or losses
        figures = {f"loss {n}": losses[n - 1] for n in (1, updates // 4, updates // 2, updates)}
        differences = [abs(loss / other - 1) for loss, other in zip(losses, exact, strict=True)]
        yield f"--precision {precision}", {**figures, "mean relative difference": mean(differences)}


def fsdp(bench: Bench) -> Lines:
    """Run a few updates under FSDP 2 on one device."""
    out, on_cpu = bench.folder / "fsdp", not torch.cuda.is_available()
    launcher = ["accelerate.commands.launch", "--config_file", RECIPES / "accelerate/fsdp.yaml"]
    launcher += ["--num_processes", 1, "--main_process_port", 0]
    script = [*([ROOT / "tests/support/fsdp_on_cpu.py"] if on_cpu else []), RECIPES / "seit_train.py", "smoke"]
    arguments = ["--epochs", 0.5, "--warmup-epochs", 0.2, "--precision", bench.pick("bf16", "no"), "--out", out]
    with patch_environment(**({"ACCELERATE_USE_CPU": "1"} if on_cpu else {})):
        subprocess.run([sys.executable, "-m", *map(str, [*launcher, *script, *arguments])], check=True)
    losses = losses_of(out)
    yield "seit_train smoke", {"updates": len(losses), "first loss": losses[0], "last loss": losses[-1]}


def resume(bench: Bench) -> Lines:
    """Run the same 12 updates twice, and once killed and resumed, each in a new process, and compare the bits."""
    arguments = ["smoke", "--crop-size", 8, "--batch-size", 32, "--checkpoint-epochs", 0.1, "--resume"]
    arguments += ["--precision", bench.pick("bf16", "no")]
    once, again, killed = (bench.folder / name for name in ("once", "again", "killed"))
    for out, kill in ((once, None), (again, None), (killed, 7), (killed, None)):  # checkpoints at 4, 8, 12
        named = {"steps": 12, "out": out, "kill": kill}
        process = FORK.Process(target=train, args=(bench, "mtm_pretrain", *arguments), kwargs=named)
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


# The rows, and the weight of each in dividing the remaining time; unused time goes to the rows that follow.
ROWS = {presets: 50, mtm: 70, others: 50, tokenize: 30, probing: 20, precisions: 40, fsdp: 30, resume: 35}
ROWS |= {compiled: 125}


def goals(step: dict[str, float]) -> Lines:
    """Compare the compiled published step, and the duration of the whole run at its speed, with the goals."""
    hours = f"hours of {EPOCHS} epochs of ImageNet-1k"
    measured = {**step, hours: EPOCHS * IMAGENET / step["images/s"] / 3600}
    least, less = {"MFU": 0.5, "MFU by data sheet": 0.5}, {"view %": 5, "data wait %": 1, hours: 24}
    for name, limit in least.items():
        if name in measured:
            yield f"{name}, at least {limit}", {"measured": measured[name], "met": measured[name] >= limit}
    for name, limit in less.items():
        yield f"{name}, under {limit}", {"measured": measured[name], "met": measured[name] < limit}


def measure(shares: dict[Callable[[Bench], Lines], float], small: bool) -> dict[str, dict[str, Any]]:
    """Measure rows (row -> weight of its time) one after the other, then the goals; print each as it is measured.

    Ends the program if `setup` fails.
    """
    rows, rest, end = {}, sum(shares.values()), time.monotonic() + SECONDS
    with tempfile.TemporaryDirectory(prefix="seitpp-gpu-") as folder:
        for row, share in shares.items():
            result = apart(row, Bench(Path(folder), small), (end - time.monotonic()) * share / rest)
            rest -= share
            print(
                f"{row.__name__}: {result['seconds']:.0f} s {result['error'] or ''}", file=sys.stderr, flush=True
            )
            if row is setup and result["error"]:
                sys.exit(2)
            rows[row.__name__] = result
            print(HEADER * (row is setup) + table_lines(row.__name__, result), end="", flush=True)
    for step in rows.get("compiled", {"lines": {}})["lines"].values():
        rows["goals"] = {"lines": dict(goals(step)), "seconds": 0.0, "error": None}
        print(table_lines("goals", rows["goals"]), end="")
    return rows


def main() -> None:
    named = {row.__name__: row for row in ROWS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file: all figures, and the log of each row that failed")
    parser.add_argument("--small", action="store_true", help="make every row tiny; also runs on a CPU")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ROW",
        choices=named,
        default=named,
        help="rows to measure: " + ", ".join(named),
    )
    options = parser.parse_args()
    if options.small:
        MATMUL_SIDE["cpu"] = 256
    rows = measure({setup: 30} | {named[name]: ROWS[named[name]] for name in options.only}, options.small)
    if options.out:
        origin = {"small": options.small, "torch": torch.__version__, "git_commit": git_commit()}
        options.out.write_text(json.dumps({**origin, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
