"""Test the claims of both papers on real pictures of 32 x 32 pixels, through the recipes alone.

    python tests/bench/pictures.py --out pictures
    OMP_NUM_THREADS=1 python tests/long/papers_in_miniature.py --pictures pictures --out miniature
    OMP_NUM_THREADS=1 python tests/long/papers_in_miniature.py --pictures pictures --out miniature --only stem

The classes are those of 1,906 emoji (tests/bench/pictures.py); masked token modeling sees 5,395 drawings besides,
and no labels. All networks have three blocks. Each row is a command, which runs once and is not repeated where its
result is there; a row that was interrupted goes on. `--jobs` rows run at the same time: with two of them, on two
cores, a seed takes about half an hour, all five two and a half. After each row OUT has
pairs.json, the two figures of every claim for each seed, and claims.md: their means, the difference paired by seed
with its 95 % interval (Student's t), and whether the claim holds (the interval is above 0), does not hold (it is
below 0), or is not decided. With `--pairs docs/miniature.json` what is measured there is not measured again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy.stats import t as student

ROOT = Path(__file__).parents[2]
SEEDS = 5
Result = dict[str, Any]


class Row(NamedTuple):
    """A command that makes OUT/NAME, or OUT/NAME-SEED: words with {NAME} for other rows, and {seed}.

    `recipe` is a recipe, or "seitpp" for the command line of the package.
    """

    name: str
    recipe: str
    words: str
    seeds: bool = True


class Claim(NamedTuple):
    """What a paper says: the figure of one row is larger than that of another one."""

    group: str
    text: str
    first: str
    than: str
    figure: Callable[[Result], float]
    of_than: Callable[[Result], float] | None = None  # where the other row's figure is another one

    @property
    def name(self) -> str:
        """The group and the text, which no other claim has."""
        return f"{self.group}: {self.text}"


EMOJI, CLIPART = "--data {pictures}/emoji", "--data {pictures}/clipart"
SPLITS = "--split train --validation-split validation"
SEIT = "digits --epochs 40 --crop-scale 0.3 1 --seed {seed} --store {emoji}"
TUNE = "digits --epochs 30 --crop-scale 0.3 1 --seed {seed}"
MTM = "digits --store {all} --epochs 30 --warmup-epochs 3 --crop-size 8 --crop-scale 0.3 1 --seed {seed}"
SEGMENT = "scenes --store {masks} --crop-size 8 --steps 600 --evaluation-steps 600 --seed {seed}"
CORRUPTED = "--suite corruptions --corruptions gaussian_noise gaussian_blur"
FIT = f"photos {EMOJI} {SPLITS} --image-size 32 --patch 4 --fit-images 1547 --workers 0 --seed 0"

ROWS = [
    # Tokenizers and stores. The first kind is that of all other rows.
    Row("refined", "tokenizer_train", f"{FIT} --num-codes 1024 --refine-steps 2000", seeds=False),
    Row("kmeans", "tokenizer_train", f"{FIT} --num-codes 1024", seeds=False),
    Row("dct", "tokenizer_train", f"{FIT} --kind patch_dct --code-dim 31 --num-codes 1024", seeds=False),
    Row(
        "vitvqgan",
        "tokenizer_train",
        f"smoke {EMOJI} {SPLITS} --image-size 32 --patch 4 --num-codes 1024 --width 128 --depth 2 --heads 2 "
        "--epochs 60 --warmup-epochs 2 --batch-size 32 --base-lr 8e-3 --checkpoint-epochs 10 --log-steps 50",
        seeds=False,
    ),
    *(
        Row(
            f"{store}",
            "tokenize_images",
            f"{data} --splits --tokenizer {{{kind}}}/tokenizer.safetensors",
            seeds=False,
        )
        for store, data, kind in (
            ("emoji", EMOJI, "refined"),
            ("clipart", CLIPART, "refined"),
            ("kinds", "--data {pictures}/kinds", "refined"),
            ("emoji-kmeans", EMOJI, "kmeans"),
            ("emoji-dct", EMOJI, "dct"),
            ("emoji-vitvqgan", EMOJI, "vitvqgan"),
        )
    ),
    Row(
        "masks",
        "tokenize_images",
        "--data {pictures}/masks --classes {pictures}/masks/classes.txt --background-class --splits "
        "--short-side 32 --tokenizer {refined}/tokenizer.safetensors",
        seeds=False,
    ),
    Row("all", "seitpp", "merge {out} {clipart} {emoji}", seeds=False),
    # Masked token modeling, and the same network with random weights.
    Row(
        "adapt",
        "tokenadapt_train",
        f"digits {EMOJI} {SPLITS} --tokenizer {{refined}}/tokenizer.safetensors --seed {{seed}}",
    ),
    Row("mtm", "mtm_pretrain", MTM),
    Row(
        "mtm-adapt",
        "mtm_pretrain",
        f"{MTM} --tokenadapt {{adapt}} --tokenadapt-fraction 0.5",
    ),
    Row(
        "random",
        "mtm_pretrain",
        "digits --store {all} --epochs 0.02 --warmup-epochs 0 --base-lr 0 --weight-decay 0 --seed {seed}",
    ),
    *(
        Row(f"{name}-{start}", "finetune", f"{TUNE} --checkpoint {{{start}}} {more}")
        for start in ("mtm", "mtm-adapt", "random")
        for name, more in (
            ("few", "--store {emoji} --labels-per-class 10 --batch-size 64 --epochs 250 --warmup-epochs 12"),
            ("tuned", "--store {emoji}"),
            ("fine", "--store {kinds}"),
        )
    ),
    *(
        Row(f"segments-{start}", "segment_ade20k", f"{SEGMENT} --checkpoint {{{start}}}")
        for start in ("mtm", "random")
    ),
    # Supervised training on tokens: augmentations, stems, tokenizers.
    Row("seit", "seit_train", SEIT),
    Row("seit-plain", "seit_train", f"{SEIT} --eda None --color None --cutmix 0"),
    Row("seit-cutmix", "seit_train", f"{SEIT} --eda None --color None"),
    Row("seit-eda", "seit_train", f"{SEIT} --color None"),
    Row("seit-noise", "seit_train", f"{SEIT} --eda None"),
    Row("seit-coloradapt", "seit_train", f"{SEIT} --color seitpp"),
    Row("seit-tokenadapt", "seit_train", f"{SEIT} --tokenadapt {{adapt}} --tokenadapt-fraction 0.5"),
    Row("seit-both", "seit_train", f"{SEIT} --color seitpp --tokenadapt {{adapt}} --tokenadapt-fraction 0.5"),
    Row("seit-conv2", "seit_train", f"{SEIT} --stem conv2"),
    Row("seit-linear", "seit_train", f"{SEIT} --stem linear --size 4"),
    *(
        Row(f"seit-{kind}", "seit_train", SEIT.replace("{emoji}", f"{{emoji-{kind}}}"))
        for kind in ("kmeans", "dct", "vitvqgan")
    ),
    # Pixels, and transfer by one, two and three stages.
    Row("pixels", "finetune", f"{TUNE.replace('digits', 'deit_digits')} {EMOJI} --epochs 40 --flip 0.5"),
    Row(
        "features",
        "tokenizer_train",
        f"features {EMOJI} {SPLITS} --image-size 32 --backbone vit_nano_patch8_32 "
        "--backbone-weights {pixels}/model.safetensors --digits 4 --num-codes 256 --seed {seed}",
    ),
    Row(
        "emoji-features",
        "tokenize_images",
        f"{EMOJI} --splits --tokenizer {{features}}/tokenizer.safetensors",
    ),
    Row("seit-features", "seit_train", SEIT.replace("{emoji}", "{emoji-features}")),
    Row("stage", "seit_train", SEIT.replace("{emoji}", "{clipart}").replace("--epochs 40", "--epochs 12")),
    Row("stages", "finetune", f"{TUNE} --checkpoint {{stage}} --store {{emoji}}"),
    *(
        Row(
            f"pixels-{start}",
            "finetune",
            f"{TUNE} --checkpoint {{{start}}} {EMOJI} --size 64 --flip 0.5 --no-three-augment",
        )
        for start in ("random", "stage", "stages")
    ),
    # Robustness to noise, to blur, to another artist, to outlines.
    *(
        Row(
            f"corrupted-{model}",
            "robustness",
            f"digits --checkpoint {{{model}}} {EMOJI} {more} {CORRUPTED} --seed {{seed}}",
        )
        for model, more in (("seit", "--tokenizer {refined}/tokenizer.safetensors"), ("pixels", ""))
    ),
    *(
        Row(
            f"{domain}-{model}",
            "evaluate",
            f"--checkpoint {{{model}}} --data {{pictures}}/{domain} --split validation {more}",
        )
        for model, more in (("seit", "--tokenizer {refined}/tokenizer.safetensors"), ("pixels", ""))
        for domain in ("emoji", "twitter", "outlines")
    ),
    # The same network on sets that are kept in other ways, at the same number of updates.
    Row(
        "storage",
        "storage_tradeoff",
        f"digits {EMOJI} {SPLITS} --tokenizer {{refined}}/tokenizer.safetensors --budgets 500B --seeds 1 "
        "--uniform 0.05 --by-score 0.05 --resolution 0.1 --jpeg-quality 1 --token-fractions --crops "
        "--crop-scale 0.3 1 --updates 600 --warmup-updates 60 --batch-size 64 --seed {seed}",
    ),
    # Continual learning with the same bytes of memory, as the paper counts them.
    Row("continual-tokens", "continual", "digits --store {emoji} --tasks 3 --memory 123kB --seed {seed}"),
    Row(
        "continual-pixels", "continual", f"digits --input pixels {EMOJI} --tasks 3 --memory 123kB --seed {{seed}}"
    ),
]


def top1(result: Result) -> float:
    """Return the accuracy of a training or an evaluation, that of the averaged weights where there are any."""
    return result.get("top1_ema", result.get("top1"))


def of(key: str) -> Callable[[Result], float]:
    """Return what reads one figure of a result."""
    return lambda result: result[key]


def kept(corruption: str) -> Callable[[Result], float]:
    """Return what reads how much of its accuracy a model keeps under a corruption, in percent."""
    return lambda result: (
        100 * mean(row["top1"] for row in result["corruptions"]["table"][corruption].values()) / result["top1"]
    )


def stored(family: str) -> Callable[[Result], float]:
    """Return what reads the accuracy of the smallest set of a family."""

    def read(result: Result) -> float:
        rows = [row for row in result["rows"] if row["family"] == family]
        return min(rows, key=lambda row: row["bytes"])["top1"]

    return read


CLAIMS = [
    Claim("mtm", "Masked token modeling helps with 10 labels a class", "few-mtm", "few-random", top1),
    Claim("mtm", "and with all labels", "tuned-mtm", "tuned-random", top1),
    Claim("mtm", "and on fine-grained classes", "fine-mtm", "fine-random", top1),
    Claim(
        "mtm",
        "Linear probe of the frozen encoder",
        "mtm",
        "mtm",
        of("linear_probe_top1"),
        of("linear_probe_top1_untrained"),
    ),
    Claim("mtm", "k-NN of the frozen encoder", "mtm", "mtm", of("knn_top1"), of("knn_top1_untrained")),
    Claim(
        "adapt", "TokenAdapt in pre-training, fine-tuned with 10 labels a class", "few-mtm-adapt", "few-mtm", top1
    ),
    Claim("adapt", "and with all labels", "tuned-mtm-adapt", "tuned-mtm", top1),
    Claim("adapt", "ColorAdapt in supervised training", "seit-coloradapt", "seit", top1),
    Claim("adapt", "TokenAdapt in supervised training", "seit-tokenadapt", "seit", top1),
    Claim("adapt", "Both over neither", "seit-both", "seit", top1),
    Claim("augmentation", "Token-CutMix", "seit-cutmix", "seit-plain", top1),
    Claim("augmentation", "and Token-EDA", "seit-eda", "seit-cutmix", top1),
    Claim("augmentation", "and Emb-Noise", "seit-noise", "seit-cutmix", top1),
    Claim("augmentation", "All three over CutMix alone", "seit", "seit-cutmix", top1),
    Claim("stem", "The stem of 4 x 4 convolutions over that of 2 x 2", "seit", "seit-conv2", top1),
    Claim("stem", "and that over a linear one", "seit-conv2", "seit-linear", top1),
    Claim("tokenizer", "A refined tokenizer over k-means alone", "seit", "seit-kmeans", top1),
    Claim("tokenizer", "A ViT-VQGAN over k-means", "seit-vitvqgan", "seit-kmeans", top1),
    Claim("tokenizer", "k-means over the DCT", "seit-kmeans", "seit-dct", top1),
    Claim("tokenizer", "Features of the pixel model over k-means", "seit-features", "seit-kmeans", top1),
    Claim("pixels", "Pixels are the ceiling of tokens", "pixels", "seit", top1),
    *(
        Claim("storage", f"Tokens over {words}", "storage", "storage", stored("tokens"), stored(family))
        for words, family in (
            ("JPEG of quality 1", "JPEG"),
            ("smaller pictures", "resolution"),
            ("some pictures by chance", "uniform"),
            ("some pictures by score", "high score"),
            ("WebP", "WEBP"),
            ("AVIF", "AVIF"),
        )
    ),
    Claim("segmentation", "MTM transfers to segmentation", "segments-mtm", "segments-random", of("mIoU")),
    Claim("stages", "Two stages over one, in pixels", "pixels-stage", "pixels-random", top1),
    Claim("stages", "Three stages over two", "pixels-stages", "pixels-stage", top1),
    Claim(
        "robustness",
        "Accuracy kept under Gaussian noise, tokens over pixels",
        "corrupted-seit",
        "corrupted-pixels",
        kept("gaussian_noise"),
    ),
    Claim("robustness", "under Gaussian blur", "corrupted-seit", "corrupted-pixels", kept("gaussian_blur")),
    Claim("robustness", "Another artist, tokens over pixels", "twitter-seit", "twitter-pixels", top1),
    Claim("robustness", "Black outlines, tokens over pixels", "outlines-seit", "outlines-pixels", top1),
    Claim(
        "continual",
        "Continual learning with 123 kB of memory, tokens over pixels",
        "continual-tokens",
        "continual-pixels",
        of("average_accuracy"),
    ),
]


class Miniature:
    """All rows below a folder, those of some seeds."""

    def __init__(self, out: Path, pictures: Path, seeds: int, pairs: dict[str, dict[str, list[float]]]) -> None:
        self.out, self.pictures, self.seeds = out, pictures, seeds
        self.rows = {row.name: row for row in ROWS}
        self.pairs = pairs  # of a claim's group and text: its two figures for each seed

    def folder(self, name: str, seed: int) -> Path:
        """Return the folder of a row."""
        return self.out / (f"{name}-{seed}" if self.rows[name].seeds else name)

    def done(self, name: str, seed: int) -> bool:
        """Return whether the result of a row is there."""
        folder, recipe = self.folder(name, seed), self.rows[name].recipe
        return (folder / ("tokens.json" if recipe in ("tokenize_images", "seitpp") else "result.json")).exists()

    def result(self, name: str, seed: int) -> Result:
        """Return the figures of a row."""
        return json.loads((self.folder(name, seed) / "result.json").read_text())

    def needs(self, name: str) -> list[str]:
        """Return the rows that a row needs."""
        return [other for other in self.rows if f"{{{other}}}" in self.rows[name].words]

    def ordered(self, names: Sequence[str], seed: int) -> list[tuple[str, int]]:
        """Return rows and what they need, each after what it needs."""
        found: list[tuple[str, int]] = []
        for name in names:
            for one in (*self.ordered(self.needs(name), seed), (name, seed if self.rows[name].seeds else 0)):
                if one not in found:
                    found.append(one)
        return found

    def run(self, name: str, seed: int) -> str | None:
        """Run a row; return what went wrong."""
        row, folder = self.rows[name], self.folder(name, seed)
        places = {other: str(self.folder(other, seed)) for other in self.needs(name)}
        places |= {"seed": str(seed), "pictures": str(self.pictures), "out": str(folder)}
        words = row.words
        for place, value in places.items():
            words = words.replace(f"{{{place}}}", value)
        if row.recipe == "seitpp":
            line = [sys.executable, "-c", "from seitpp.cli import main; main()", *words.split()]
        else:
            resumable = ["--resume"] if row.recipe not in ("tokenize_images", "evaluate") else []
            again = ["--overwrite"] if row.recipe == "evaluate" else []
            line = [
                sys.executable,
                str(ROOT / f"recipes/{row.recipe}.py"),
                *words.split(),
                "--out",
                str(folder),
                *resumable,
                *again,
            ]
        with folder.with_suffix(".log").open("w") as log:
            done = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT)
        last = folder.with_suffix(".log").read_text(errors="replace").strip().splitlines()[-1:]
        return None if done.returncode == 0 else f"{name}, seed {seed}: {''.join(last)}"

    def run_all(self, claims: Sequence[Claim], jobs: int) -> None:
        """Run what the claims need, seed by seed, `jobs` rows at the same time; write the table after each row."""
        todo = []
        for seed in range(self.seeds):
            open_claims = [claim for claim in claims if str(seed) not in self.pairs.get(claim.name, {})]
            for name, its in self.ordered(
                [row for claim in open_claims for row in (claim.first, claim.than)], seed
            ):
                if not self.done(name, its) and (name, its) not in todo:
                    todo.append((name, its))
        total, running, failed = len(todo), {}, []
        with ThreadPoolExecutor(jobs) as pool:
            while todo or running:
                for one in [one for one in todo if all(self.done(other, one[1]) for other in self.needs(one[0]))]:
                    if len(running) < jobs:
                        todo.remove(one)
                        running[pool.submit(self.run, *one)] = one
                if not running:
                    failed += [f"{name}, seed {seed}: needs what failed" for name, seed in todo]
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name, seed = running.pop(future)
                    failed += [future.result()] if future.result() else []
                    print(f"{total - len(todo) - len(running):4} of {total}  {name}, seed {seed}", flush=True)
                    self.note()
        if failed:
            sys.exit("\n".join(failed))

    def note(self) -> None:
        """Write what is known of all claims."""
        for claim in CLAIMS:
            for seed in range(self.seeds):
                if all(self.done(name, seed) for name in (claim.first, claim.than)):
                    of_than = claim.of_than or claim.figure
                    pair = [claim.figure(self.result(claim.first, seed)), of_than(self.result(claim.than, seed))]
                    self.pairs.setdefault(claim.name, {})[str(seed)] = [round(figure, 3) for figure in pair]
        (self.out / "pairs.json").write_text(json.dumps(self.pairs, indent=1) + "\n")
        (self.out / "claims.md").write_text(self.table(CLAIMS))

    def table(self, claims: Sequence[Claim]) -> str:
        """Return the table of all claims with at least two seeds."""
        lines = ["| claim | first | second | difference, 95 % interval | seeds | |", "|---|---|---|---|---|---|"]
        for claim in claims:
            pairs = [self.pairs[claim.name][seed] for seed in sorted(self.pairs.get(claim.name, {}))]
            if len(pairs) > 1:
                lines.append(f"| {claim.text} | {' | '.join(judged(pairs))} |")
        return "\n".join(lines) + "\n"


def judged(pairs: Sequence[Sequence[float]]) -> list[str]:
    """Return the cells of a claim: both means, the difference with its interval, the seeds, the judgment."""
    differences = [first - other for first, other in pairs]
    center, n = mean(differences), len(differences)
    half = float(student.ppf(0.975, n - 1)) * stdev(differences) / n**0.5
    judgment = "holds" if center - half > 0 else "does not hold" if center + half < 0 else "not decided"
    means = [f"{mean(side):.1f}" for side in zip(*pairs, strict=True)]
    return [*means, f"{center:+.1f} [{center - half:+.1f}, {center + half:+.1f}]", str(n), judgment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="folder that tests/bench/pictures.py made")
    parser.add_argument("--out", type=Path, required=True, help="folder of all rows")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="groups of claims (default: all)")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=1, help="rows that run at the same time")
    parser.add_argument("--pairs", type=Path, help="figures that are known (default: those of --out)")
    arguments = parser.parse_args()
    groups = list(dict.fromkeys(claim.group for claim in CLAIMS))
    if unknown := sorted({*(arguments.only or ())} - {*groups}):
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(groups)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    known = arguments.pairs or arguments.out / "pairs.json"
    pairs = json.loads(known.read_text()) if arguments.pairs or known.exists() else {}
    miniature = Miniature(arguments.out.resolve(), arguments.pictures.resolve(), arguments.seeds, pairs)
    chosen = [claim for claim in CLAIMS if claim.group in (arguments.only or groups)]
    miniature.run_all(chosen, arguments.jobs)
    print(miniature.table(chosen))


if __name__ == "__main__":
    main()
