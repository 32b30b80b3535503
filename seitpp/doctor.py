"""What `seitpp doctor` says: versions, devices, cache and environment, and a self-test of some seconds."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from seitpp import StoreWriter, TokenStore, codec
from seitpp.codec import CODECS, ContextCodec
from seitpp.engine.optim import adamw
from seitpp.engine.system import cores
from seitpp.errors import UserError, escaped, reason
from seitpp.files import cache_root
from seitpp.models import MTM
from seitpp.objectives import mask_plan

REQUIRED = ("torch", "torchvision", "timm", "accelerate", "datasets", "kornia", "numpy", "pyarrow", "constriction")
# Packages of the extras, each with the extra that installs it.
OPTIONAL = {
    "obstore": "buckets",
    "diffusers": "tokenizers",
    "transformers": "tokenizers",
    "onedl-mmsegmentation": "segmentation",
    "imagecorruptions-imaug": "robustness",
    "pyautoattack": "robustness",
    "datatrove": "distributed",
    "deepspeed": "deepspeed",
    "tensorboard": "trackers",
    "wandb": "trackers",
    "trackio": "trackers",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Variables that change what a run does or where it writes. Values are printed of these only.
VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "ACCELERATE_USE_CPU",
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "XDG_CACHE_HOME",
    "TMPDIR",
)
SECRET = (
    "AWS_",
    "AZURE_",
    "GOOGLE_",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HTTP_PROXY",
    "HTTPS_PROXY",
)  # begin so: names only
GRID, CODES, DIM, IMAGES = (8, 8), 64, 4, 32  # of the random tokens of the self-test
GIB = 2**30


class DoctorError(UserError):
    """Raised by a part of the self-test whose result is not what it has to be."""


class Check(NamedTuple):
    """A part of the self-test: its name, what raises an exception if it fails, and what the user can do then."""

    name: str
    run: Callable[[], None]
    remedy: str


def examine() -> bool:
    """Print all there is to know about this installation, and return whether nothing is wrong with it.

    The last lines name what is wrong, one line each, with what to do.
    """
    wrong = []
    for title, rows in (("versions", versions()), ("machine", machine()), ("environment", environment())):
        print(title)
        for name, value in rows:
            print(f"  {name:24} {escaped(value)}", flush=True)
    missing = [name for name in REQUIRED if _version(name) is None]
    wrong += [f"{name}: not installed, every recipe needs it; pip install {name}" for name in missing]
    print("self-test")
    for check in checks():
        started = time.perf_counter()
        problem = failure(check)
        said = f"ok, {time.perf_counter() - started:.2f} s" if problem is None else "FAILED"
        print(f"  {check.name:24} {said}", flush=True)
        wrong += [] if problem is None else [f"{check.name}: {problem}; {check.remedy}"]
    print("\n".join(["", *(wrong or ["all is well"])]))
    return not wrong


def versions() -> Iterator[tuple[str, str]]:
    """Yield the versions of seitpp, Python and packages; a missing one of an extra with how to install it."""
    yield "seitpp", _version("seitpp") or "not installed"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    for name in REQUIRED:
        yield name, _version(name) or "not installed"
    for name, extra in OPTIONAL.items():
        yield name, _version(name) or f'not installed (pip install "seitpp[{extra}]")'


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> Iterator[tuple[str, str]]:
    """Yield the devices with their memory and the dtypes that work on them, the cores, and the cache."""
    for device in devices():
        yield str(device), f"{memory(device)}; {', '.join(working_dtypes(device)) or 'no dtype'} work"
    yield "torch.compile", "there, not tried" if hasattr(torch, "compile") else "not there"
    yield "cores", f"{cores()} for this process, {torch.get_num_threads()} threads of torch"
    try:
        root = cache_root()
    except UserError as error:
        yield "cache", str(error)
        return
    there = next(path for path in (root, *root.parents) if path.exists())
    yield (
        "cache",
        f"{root}, {folder_bytes(root) / 2**20:,.1f} MiB, {shutil.disk_usage(there).free / GIB:.1f} GiB free",
    )


def environment() -> Iterator[tuple[str, str]]:
    """Yield the variables that are set and change what a run does; of those that may be secret only the names."""
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]
    for name in sorted(os.environ):
        if name.upper().startswith(SECRET):
            yield name, "is set (its value is not shown)"


def devices() -> list[torch.device]:
    """Return the CPU, every GPU that torch sees, and an Apple GPU."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return found + [torch.device("mps")] * torch.backends.mps.is_available()


def memory(device: torch.device) -> str:
    """Return the name of a device, where it has one, and its memory, free and in all."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if device.type == "mps":
        return f"{torch.mps.recommended_max_memory() / GIB:.1f} GiB recommended"
    found = psutil.virtual_memory()
    return f"{platform.machine()}, {found.available / GIB:.1f} of {found.total / GIB:.1f} GiB free"


def working_dtypes(device: torch.device) -> list[str]:
    """Return the names of the dtypes in which the device multiplies matrices.

    Older GPUs have bfloat16 in software only, which does not count.
    """
    names = []
    for dtype in DTYPES:
        if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            continue
        try:
            ones = torch.ones(8, 8, dtype=dtype, device=device)
            if (ones @ ones == 8).all():
                names.append(str(dtype).removeprefix("torch."))
        except (RuntimeError, TypeError):  # the device has no such dtype
            continue
    return names


def folder_bytes(folder: Path) -> int:
    """Return the size in bytes of the files of a folder, 0 if there is none; links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def checks() -> list[Check]:
    """Return the parts of the self-test: each codec, a store, and a training step on each device."""
    reinstall = "reinstall it: pip install --force-reinstall seitpp constriction"
    folder = f"look at the folder for temporary files, {tempfile.gettempdir()} (TMPDIR), or reinstall seitpp"
    train = {
        "cpu": "reinstall torch and torchvision together: pip install --force-reinstall torch torchvision",
        "cuda": "look at nvidia-smi and at the driver that this torch needs; ACCELERATE_USE_CPU=1 trains without",
        "mps": "upgrade torch; ACCELERATE_USE_CPU=1 trains without",
    }
    return [
        *(Check(f"codec {name}", partial(check_codec, name), reinstall) for name in CODECS),
        Check("store", check_store, folder),
        *(Check(f"training on {one}", partial(check_step, one), train[one.type]) for one in devices()),
    ]


def failure(check: Check) -> str | None:
    """Run a check and return what went wrong in one line, or None."""
    try:
        check.run()
    except Exception as problem:  # whatever is broken is to be reported, and the other checks are still to run
        return reason(problem)
    return None


def random_ids() -> np.ndarray:
    """Return ids int64 (IMAGES, *GRID), the smaller ones more often."""
    drawn = np.random.default_rng(0).integers(0, CODES, (2, IMAGES, *GRID))
    return drawn.min(axis=0)


def random_codebook() -> np.ndarray:
    """Return vectors float32 (CODES, DIM)."""
    return np.random.default_rng(1).normal(size=(CODES, DIM)).astype(np.float32)


def check_codec(name: str) -> None:
    """Encode random tokens and decode them again. Raises DoctorError if they are not the same."""
    ids = random_ids()
    counts = np.bincount(ids.ravel(), minlength=CODES)
    table = ContextCodec.learn(ids, random_codebook()).table if name == "context" else None
    coder = codec.build(name, CODES, counts, grid=GRID, table=table)
    for image in ids:
        decoded = coder.decode(coder.encode(image.ravel()), image.size)
        if not np.array_equal(decoded, image.ravel()):
            raise DoctorError("decoded other tokens than it had encoded")


def check_store() -> None:
    """Write a small store into a temporary folder, verify it and read it. Raises DoctorError for other tokens."""
    ids = random_ids()
    with tempfile.TemporaryDirectory(prefix="seitpp-doctor-") as folder:
        with StoreWriter(Path(folder) / "store", codebook=random_codebook(), grid=GRID) as writer:
            writer.add_batch(ids, [number % 10 for number in range(IMAGES)])
        store = TokenStore(Path(folder) / "store")
        store.verify()
        if not np.array_equal(store.ids(range(IMAGES)), ids):
            raise DoctorError("read other tokens than were written")


def check_step(device: torch.device) -> None:
    """Train a tiny masked token model for one step. Raises DoctorError if its weights stay or are not finite."""
    sizes = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "dropout": 0.0}
    model = MTM("mtm_vit_nano", grid=GRID, num_codes=CODES, code_dim=DIM, **sizes).to(device)
    ids = torch.from_numpy(random_ids()).to(device)
    patches = model.encoder.patch_embed.num_patches
    plan = mask_plan(torch.rand(IMAGES, patches, device=device), patches // 4, patches // 2)
    optimizer = adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    loss, _ = model(ids, plan, targets=ids)
    loss.backward()
    optimizer.step()
    if not torch.isfinite(loss):
        raise DoctorError(f"the loss is {loss.item()}, expected a finite number")
    if all(torch.equal(value, before[name]) for name, value in model.named_parameters()):
        raise DoctorError("a training step has changed no weight")
