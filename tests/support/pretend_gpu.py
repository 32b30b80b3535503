"""Recipes on a GPU that is not there: real tensors that claim to lie on a device, and a record of what it would
see.

    echo '[["seit_train", ["smoke", "--out", "OUT"]]]' |
        PYTHONPATH=recipes python tests/support/pretend_gpu.py [--shapes]

torch lets Python register a device. Here it is called "gpu": its tensors hold a tensor of the CPU, and every
operation on them comes by `Device.__torch_dispatch__`, which computes it on the CPU and writes down what a GPU
would not do, or not without waiting. With --shapes they hold no numbers, so that models of any size take no time:
what is copied to the host is then ones, and a run stops after two steps. Each job of the list on stdin, a recipe
and its arguments, prints one line of JSON. Registering a device is for a whole process, so this is a program of
its own.
"""

import contextlib
import importlib
import json
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

torch.backends.disable_global_flags = lambda: None  # else torch's own tests forbid what full_precision does
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

ROOT = Path(__file__).parents[2]
from seitpp.engine.metrics import MATMUL_SIDE  # noqa: E402
from seitpp.models import cross_entropy  # noqa: E402

CUSTOM = {"linear_cross_entropy": cross_entropy._linear_cross_entropy}
NAME = "gpu"
STEPS_OF_SHAPES = 2

HALVES = (torch.float16, torch.bfloat16)
# A GPU casts and views these, and can do nothing else with them.
ONLY_CAST = {torch.uint16, torch.uint32, torch.uint64}
CASTS_AND_VIEWS = {
    *("_to_copy", "copy_", "detach", "alias", "view", "_unsafe_view", "reshape", "slice", "select", "unsqueeze"),
    *(
        "squeeze",
        "permute",
        "transpose",
        "t",
        "expand",
        "as_strided",
        "clone",
        "empty_like",
        "lift_fresh",
        "split",
    ),
    *("unbind", "split_with_sizes", "narrow", "empty", "empty_strided", "new_empty", "zeros", "new_empty_strided"),
}
# Their results' sizes, or Python's next step, depend on numbers: the host waits for the device.
WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"),
    *("_linalg_check_errors", "bincount", "is_nonzero", "histc", "segment_reduce"),
}
# What autocast does on CUDA: https://docs.pytorch.org/docs/stable/amp.html
IN_HALF = (
    *(
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d.input",
        "linear",
        "matmul",
        "mm",
        "mv",
        "bmm",
    ),
    *("addmm", "baddbmm", "addbmm", "prelu", "scaled_dot_product_attention"),
)
IN_SINGLE = (
    *("layer_norm", "group_norm", "softmax.int", "log_softmax.int", "exp", "log", "pow.Tensor_Scalar", "rsqrt"),
    *("sum", "sum.dim_IntList", "prod", "cumsum", "norm.Scalar", "mse_loss", "nll_loss", "nll_loss_nd"),
    *("cross_entropy_loss", "cdist", "reciprocal", "binary_cross_entropy_with_logits", "cosh", "acos", "tan"),
)
# By the names of operations, the dtypes that their CUDA kernels take, as torch's own tests know them.
CUDA_DTYPES = {}
for info in op_db:
    taken = set(info.supported_dtypes("cuda"))
    # Without a GPU the table leaves half precision out of products.
    CUDA_DTYPES.setdefault(info.aten_name, set()).update(taken | {*HALVES} if torch.float32 in taken else taken)


class Module:
    """What torch asks of a device's module."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def is_bf16_supported(self, *_) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """The host's generator, seeded too, gives the numbers."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Pretended(torch.Tensor):
    """A tensor that claims to be on the device and holds one that is not."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False) -> "Pretended":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{NAME}:0",
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) not in memo:
            copy = Pretended(self.held.clone())
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter(self) else copy
        return memo[id(self)]

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self, **_) -> str:
        return f"on the device: {self.held}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of Device")


class HostGenerator(torch.Generator):
    """Whatever device is asked for."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        return super().__new__(cls, "cpu")


def is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


HALVES = {torch.bfloat16, torch.float16}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


def _cast(value: object, kinds: set[torch.dtype], dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype in kinds else value


class Device(TorchDispatchMode):
    """Computes for pretended tensors; keeps `faults`, and `waits` and `copies` of training steps, with places."""

    def __init__(self, shapes: bool):
        super().__init__()
        self.shapes, self.in_step, self.steps = shapes, False, 0
        self.faults, self.waits, self.copies = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        pretended = [leaf for leaf in leaves if isinstance(leaf, Pretended)]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if not pretended and target != NAME:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "seitpp":  # an operator of ours: look into it
            with self:
                return CUSTOM[name]._init_fn(*args, **kwargs)
        self._judge(name, leaves, pretended, args, kwargs)
        if self.shapes and name == "_local_scalar_dense":
            return 1.0 if args[0].dtype.is_floating_point else 1
        to_host = target == "cpu" or (name == "copy_" and not isinstance(args[0], Pretended))
        if self.shapes and to_host:
            return self._ones_on_host(name, args, kwargs)
        if target == NAME:
            kwargs["device"] = torch.device("meta" if self.shapes else "cpu")
        outputs = self._compute(func, tree_map(self._unwrap, args), tree_map(self._unwrap, kwargs))
        if target not in (None, NAME):
            return outputs
        known = {id(leaf.held): leaf for leaf in pretended}
        return tree_map(lambda output: self._wrap(output, known), outputs)

    def _compute(self, func, args, kwargs):
        """Call `func`; matrix products of half precision in single, since many hosts take minutes for them."""
        halves = {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)} & HALVES
        if self.shapes or func.overloadpacket.__name__ not in PRODUCTS or not halves:
            return func(*args, **kwargs)
        outputs = func(*tree_map(lambda value: _cast(value, HALVES, torch.float32), args), **kwargs)
        return tree_map(lambda value: _cast(value, {torch.float32}, min(halves, key=str)), outputs)

    def _unwrap(self, value):
        if isinstance(value, Pretended):
            return value.held
        # A number of the host, or what is just being copied from it.
        return value.to("meta") if self.shapes and isinstance(value, torch.Tensor) else value

    @staticmethod
    def _wrap(output, known: dict):
        """What an operation gave, on the device; what it changed in place is the tensor that it was."""
        if not isinstance(output, torch.Tensor):
            return output
        return known[id(output)] if id(output) in known else Pretended(output)

    @staticmethod
    def _ones_on_host(name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        source = args[1] if name == "copy_" else args[0]
        ones = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return args[0].copy_(ones) if name == "copy_" else ones

    def _judge(self, name: str, leaves: list, pretended: list, args: tuple, kwargs: dict) -> None:
        """Write down what is wrong with an operation, or what the host waits for."""
        hosts = [leaf for leaf in leaves if not isinstance(leaf, Pretended)]
        dtypes = {leaf.dtype for leaf in pretended}
        if torch.float64 in dtypes | {kwargs.get("dtype")}:
            self.faults[f"float64 on the device at {place()}"] += 1
        for dtype in lacking(name, dtypes):
            self.faults[f"CUDA has no {name} of {dtype}: at {place()}"] += 1
        if name in ("_to_copy", "copy_"):
            if hosts or kwargs.get("device") not in (None, torch.device(NAME), torch.device(NAME, 0)):
                self._transfer(name, args, kwargs)
            return
        indexing = name in ("index", "index_put_")
        # A number may come from the host, as torch allows; an index too, but it is copied first.
        if pretended and any(host.ndim for host in hosts):
            if not indexing:
                shapes = [(tuple(leaf.shape), leaf.device.type) for leaf in leaves]
                self.faults[f"{name} of host and device at {place()}: {shapes}"] += 1
                raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {shapes}")
            self._count(self.copies, f"an index copied to the device at {place()}")
        selects = indexing and any(index is not None and index.dtype == torch.bool for index in args[1])
        sized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITS or selects or sized:
            self._count(self.waits, f"{name} at {place()}")

    def _transfer(self, name: str, args: tuple, kwargs: dict) -> None:
        source = args[1] if name == "copy_" else args[0]
        direction = "to the host" if isinstance(source, Pretended) else "to the device"
        free = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if not free:
            self._count(self.copies, f"{tuple(source.shape)} {direction} at {place()}")

    def _count(self, counter: Counter, what: str) -> None:
        if self.in_step:
            counter[what] += 1

    @contextlib.contextmanager
    def outside_a_step(self):
        before, self.in_step = self.in_step, False
        try:
            yield
        finally:
            self.in_step = before


def register_autocast() -> list[torch.library.Library]:
    """Autocast of the device does what that of CUDA does; the libraries must stay alive."""
    rest, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    without = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def register(full_name: str, half: bool) -> None:
        name, _, overload = full_name.partition(".")
        operation = getattr(getattr(torch.ops.aten, name), overload or "default")

        def computed(*args, **kwargs):
            dtype = torch.get_autocast_dtype(NAME) if half else torch.float32

            def cast(value):
                floats = isinstance(value, torch.Tensor) and value.dtype in {torch.float32, *HALVES}
                return value.to(dtype) if floats and value.device.type == NAME else value

            with torch._C._ExcludeDispatchKeyGuard(without):
                return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

        aten.impl(full_name, computed)

    for name in (*IN_HALF, *IN_SINGLE):
        register(name, name in IN_HALF)
    return [rest, aten]


def lacking(name: str, dtypes: set[torch.dtype]) -> set[torch.dtype]:
    """Those of an operation's dtypes that CUDA does not take; indices are not looked at beside floats."""
    if name in CASTS_AND_VIEWS:
        return set()
    none, known = dtypes & ONLY_CAST, CUDA_DTYPES.get({"index": "__getitem__"}.get(name, name))
    if not known:
        return none
    floats = {dtype for dtype in dtypes if dtype.is_floating_point}
    return none | (floats - known if floats else dtypes if not dtypes & known else set())


def place() -> str:
    """The innermost line of this project that leads here."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and "tests" not in path.relative_to(ROOT).parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "?"


class Enough(Exception):
    """The steps of a run on shapes are done."""


def watch_steps(device: Device) -> None:
    """From the loop's body to the end of `update` is a step; logs, checkpoints and evaluations are not."""
    from seitpp.engine.training import Training

    steps = Training.steps

    def watched(training, *args, **kwargs):
        for item in steps(training, *args, **kwargs):
            if device.shapes and device.steps == STEPS_OF_SHAPES:
                raise Enough
            device.in_step = True
            yield item
            device.in_step = False
            device.steps += 1

    Training.steps = watched
    for name in ("_flush", "save", "_evaluate"):
        setattr(Training, name, outside(getattr(Training, name), device))


def outside(method, device: Device):
    def wrapped(*args, **kwargs):
        with device.outside_a_step():
            return method(*args, **kwargs)

    return wrapped


def run_job(device: Device, recipe: str, arguments: list[str]) -> dict:
    """Run a recipe in this process and report."""
    from seitpp.engine.config import parse

    module = importlib.import_module(recipe)
    for counter in (device.faults, device.waits, device.copies):
        counter.clear()
    device.steps, sys.argv, error = 0, [recipe, *arguments], None
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    default = {"segment_ade20k": "scenes", "evaluate_segmentation": "scenes"}.get(recipe, "digits")
    try:
        with device:
            module.main(parse(module.PRESETS, default, arguments))
    except Enough:
        pass
    except Exception as failure:
        frames = [
            f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(failure.__traceback__)
        ]
        error = f"{type(failure).__name__}: {str(failure)[:500]} ({' '.join(frames[-8:])})"
    device.in_step = False
    report = {name: dict(getattr(device, name)) for name in ("faults", "waits", "copies")}
    return {"recipe": recipe, "arguments": arguments, "steps": device.steps, "error": error, **report}


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    libraries = register_autocast()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(.., device=..) is a tensor of the host and a copy
    torch.Generator = HostGenerator
    torch.__future__.set_swap_module_params_on_conversion(True)
    PartialState.default_device = property(lambda state: torch.device(NAME))
    device = Device(shapes="--shapes" in sys.argv)
    if device.shapes:  # initial numbers would take most of the time
        for name in ("uniform_", "normal_", "erfinv_"):
            setattr(torch.Tensor, name, lambda tensor, *_, **__: tensor)
        # It draws again until all numbers are within bounds, which those that are not there never are.
        torch.nn.init._no_grad_trunc_normal_ = lambda tensor, *_, **__: tensor
    MATMUL_SIDE[NAME] = 64  # a large product takes minutes on a host without bfloat16
    watch_steps(device)
    for recipe, arguments in json.loads(sys.stdin.read()):
        report = run_job(device, recipe, arguments)
        print("report " + json.dumps(report), flush=True)
    del libraries


if __name__ == "__main__":
    main()
