"""Compare tokens with pixels: the time to load 100 images, and that of an epoch of training.

    OMP_NUM_THREADS=1 python tests/bench/loading.py [--images 128] [--rounds 5]

The images are crops of scikit-learn's photographs as JPEG of 400 x 300 pixels and quality 90; their tokens are
32 x 32 of 391 codes (patch_kmeans at 256 pixels), as stored. Loading is what a worker of the loader does with a
batch: JPEG files become random resized crops of 224 x 224 pixels, or whole images of 256 x 256; a store gives
ids, which the view makes vectors, cropped to 28 x 28. An epoch is loading, augmentation, and the forward and
backward pass of a ViT of 14 x 14 patches (seit_vit_nano and its copy on pixels, CutMix on both, no 3-Augment), one
after the other, so that nothing hides behind the network. One thread, files in the system's cache; the ways
alternate and the best round of each counts. The papers have 0.84 s and 0.07 s for 100 images, and 5 min 40 s and
5 min 12 s for an epoch, and do not say on which machine.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from tokenize_images import make_images, make_tokenizer
from torch import nn

import seitpp.models  # noqa: F401 (registers our models in timm)
from seitpp import StoreWriter, TokenStore
from seitpp.augment import Keys, PixelView, RandomBoxes, SeitView
from seitpp.data.dataset import MicroBatch, TokenDataset
from seitpp.images.batches import ImageDataset
from seitpp.images.sources import open_source
from seitpp.models.vit import SIZES
from seitpp.objectives import soft_label_loss

BATCH, LOADED = 32, 100


def write_store(images: ImageDataset, path: Path) -> TokenStore:
    """Tokenize all images; their labels are made up."""
    tokenizer = make_tokenizer(path.parent / "tokenizer.safetensors")
    with StoreWriter(path, codebook=tokenizer.codebook.numpy(), grid=tokenizer.spec.grid) as writer:
        for start in range(0, len(images), BATCH):
            indices = list(range(start, min(start + BATCH, len(images))))
            ids = tokenizer.encode(images.__getitems__(indices).images / 255)
            writer.add_batch(ids.numpy(), [index % 10 for index in indices])
    return TokenStore(path)


def step(model: nn.Module, inputs: torch.Tensor, targets: object) -> None:
    soft_label_loss(model(inputs), targets, 0.1).backward()
    model.zero_grad()


def ways(root: Path, count: int) -> dict[str, Callable[[int], None]]:
    """Return each way to load 100 images, or to train an epoch, as a function of the number of the round."""
    (root / "images").mkdir()
    make_images(root / "images", count)
    source = open_source(str(root / "images"))
    crops, whole = ImageDataset(source, (224, 224), RandomBoxes(0, (224, 224))), ImageDataset(source, (256, 256))
    tokens = TokenDataset(write_store(whole, root / "store"))
    token_view = SeitView(torch.from_numpy(tokens.store.codebook), size=28, eda="release", color="paper")
    pixel_view = PixelView(three_augment=False)
    token_model = timm.create_model("seit_vit_nano", num_classes=10)
    sizes = SIZES["nano"]
    pixel_model = timm.models.VisionTransformer(224, 16, num_classes=10, global_pool="avg", **sizes)

    def load(dataset: ImageDataset | TokenDataset, start: int, size: int, epoch: int) -> tuple:
        batch = dataset.__getitems__(MicroBatch(range(start, start + size), epoch))
        return batch, Keys(0, epoch, batch.indices)

    def vectors(epoch: int) -> None:
        batch, keys = load(tokens, 0, LOADED, epoch)
        token_view(batch.ids, batch.labels, keys)

    def epoch_of(dataset: ImageDataset | TokenDataset, view: nn.Module, model: nn.Module) -> Callable[[int], None]:
        def train(epoch: int) -> None:
            for start in range(0, count - BATCH + 1, BATCH):
                batch, keys = load(dataset, start, BATCH, epoch)
                labels = batch.labels.clamp(min=0)  # the images have none
                step(model, *view(batch[1], labels, keys))

        return train

    return {
        "100 images, crops of JPEGs": lambda epoch: load(crops, 0, LOADED, epoch),
        "100 images, whole JPEGs": lambda epoch: load(whole, 0, LOADED, epoch),
        "100 images, ids of tokens": lambda epoch: load(tokens, 0, LOADED, epoch),
        "100 images, augmented vectors of tokens": vectors,
        "epoch on crops of JPEGs": epoch_of(crops, pixel_view, pixel_model),
        "epoch on tokens": epoch_of(tokens, token_view, token_model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tried = ways(Path(folder), options.images)
        seconds = {name: [] for name in tried}
        for epoch in range(options.rounds):
            for name, run in tried.items():
                start = time.perf_counter()
                run(epoch)
                seconds[name].append(time.perf_counter() - start)
    best = {name: min(times) for name, times in seconds.items()}
    for name, least in best.items():
        print(f"{name:40} {least:8.3f} s")
    pixels, decoded, ids, made, pixel_epoch, token_epoch = best.values()
    print(
        f"pixels / tokens: {pixels / ids:.1f} for ids and {pixels / made:.1f} for augmented vectors (whole images "
        f"{decoded / ids:.1f} and {decoded / made:.1f}), {pixel_epoch / token_epoch:.2f} for an epoch of "
        f"{options.images} images"
    )


if __name__ == "__main__":
    main()
