"""The house: imports point down only, and some rooms know nothing of others whatever the floors allow."""

import ast
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from support.paths import ROOT

from seitpp.augment.maps import crop_resize

GROUND = ["errors", "books", "files", "tensors", "codebook"]  # what every floor stands on
ROOMS = ["codec", "store", "images", "tokenizers", "data", "augment", "models", "objectives", "engine"]
TOP = ["fonts", "plots", "export", "recipe", "distributed", "doctor", "cli"]
FLOORS = [*(f"seitpp.{name}" for name in (*GROUND, *ROOMS, *TOP)), "downstream", "recipes"]
FILES = sorted(path for folder in ("seitpp", "downstream", "recipes") for path in (ROOT / folder).rglob("*.py"))
# Whoever asks the package itself for a name asks for what it re-exports.
FRONT_DOOR = {"seitpp.TokenStore": "seitpp.store", "seitpp.StoreWriter": "seitpp.store"}

# Of a place, what it must not know: neither these modules nor anything below them.
WALLS = {
    "networks know no file format": (
        [
            f"seitpp.models.{path.stem}"
            for path in (ROOT / "seitpp/models").glob("*.py")
            if path.stem != "__init__"
        ],
        ["seitpp.files", "seitpp.tensors", "seitpp.models.weights", "safetensors"],
    ),
    "augmentations and images know no tokenizer": (["seitpp.augment", "seitpp.images"], ["seitpp.tokenizers"]),
    "nothing below the exports knows a run's folder": (
        [f"seitpp.{name}" for name in (*GROUND, *ROOMS[:-1])],
        ["seitpp.engine", "seitpp.export", "seitpp.recipe"],
    ),
    "only segmentation knows mmsegmentation": (
        ["seitpp", "recipes", "downstream.finegrained"],
        ["mmseg", "mmcv", "mmengine"],
    ),
    "only robustness knows its extra": (
        ["seitpp", "recipes", "downstream.finegrained", "downstream.segmentation"],
        ["imagecorruptions", "pyautoattack"],
    ),
    "only distributed knows its extra": (
        [*(f"seitpp.{name}" for name in (*GROUND, *ROOMS, *TOP) if name != "distributed"), "recipes"],
        ["datatrove", "ray"],
    ),
    "nobody imports a recipe": (["seitpp", "downstream", "recipes"], ["recipes"]),
}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Full names of the modules and names that a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def below(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def floor(name: str) -> int | None:
    """The floor of a module, or of a name in it; None for the package itself and for other packages."""
    name = FRONT_DOOR.get(name, name)
    return next((number for number, place in enumerate(FLOORS) if below(name, place)), None)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_point_down(path: Path) -> None:
    own = floor(module(path))
    if own is None:
        assert module(path) == "seitpp"
        return
    for name in imports(path):
        wanted = floor(name)
        assert wanted is None or wanted <= own, f"{path} ({FLOORS[own]}) imports {name} from above it"


@pytest.mark.parametrize("wall", WALLS)
def test_walls(wall: str) -> None:
    places, forbidden = WALLS[wall]
    broken = [
        f"{module(path)} imports {name}"
        for path in FILES
        if any(below(module(path), place) for place in places)
        for name in imports(path)
        if any(below(name, place) for place in forbidden)
    ]
    assert not broken


def test_no_path_is_changed_to_find_a_module() -> None:
    scripts = [*FILES, *(path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))]
    assert [str(path) for path in scripts if "sys.path" in path.read_text()] == []


def test_the_command_line_and_the_store_import_nothing_that_takes_long() -> None:
    slow = {"torch", "datasets", "pandas", "huggingface_hub", "matplotlib", "pyarrow.compute"}
    code = f"import seitpp, seitpp.codec, seitpp.store, seitpp.cli, sys; print(*{slow} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_rules_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def late():\n    from seitpp.engine import run\n")
    assert imports(bad) == {"seitpp.engine.run"}
    assert floor("seitpp.engine.run") > floor("seitpp.codec.ans") and below("mmseg.models", "mmseg")


def functions_and_classes() -> list[tuple[str, ast.AST]]:
    return [
        (f"{module(path)}.{node.name}", node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]


def test_functions_are_short_and_classes_small() -> None:
    for name, node in functions_and_classes():
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{name} has more than 80 lines"
        else:
            public = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name[0] != "_"]
            assert len(public) <= 15, f"{name} has {len(public)} public methods"


def public_signatures(path: Path) -> list[tuple[str, ast.FunctionDef, int]]:
    """The name, the node and the number of its bound parameters (self, cls) of what others may call in a file."""
    tree, found = ast.parse(path.read_text()), []
    for scope in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for node in scope.body:
            name = getattr(node, "name", "_")
            if isinstance(node, ast.FunctionDef) and (name[0] != "_" or name in ("__init__", "__call__")):
                static = any(getattr(mark, "id", "") == "staticmethod" for mark in node.decorator_list)
                bound = int(scope is not tree and not static)
                found.append((f"{module(path)}.{getattr(scope, 'name', '')}.{name}", node, bound))
    return found


def bare_arrays(annotation: ast.AST | None) -> bool:
    """Whether an annotation names arrays without their shape: `Tensor`, `list[np.ndarray]`.

    Arrays by name, such as a state dict, have no shape in common.
    """
    if annotation is None:
        return False
    subscripted = getattr(annotation.value, "id", "") if isinstance(annotation, ast.Subscript) else ""
    if subscripted in ("dict", "Mapping") or subscripted in vars(jaxtyping):
        return False
    if isinstance(annotation, ast.Name | ast.Attribute):
        return ast.unparse(annotation) in ("Tensor", "torch.Tensor", "np.ndarray")
    return any(map(bare_arrays, ast.iter_child_nodes(annotation)))


def test_arrays_of_public_signatures_have_shapes() -> None:
    """In the rooms that are all about arrays; what is written there is checked by tests/support/shapes.py."""
    rooms = [f"seitpp.{room}" for room in ("codebook", "codec", "store", "augment", "models", "objectives")]
    bare = [
        name
        for path in FILES
        if any(below(module(path), room) for room in rooms)
        for name, node, _ in public_signatures(path)
        for annotation in (*(a.annotation for a in (*node.args.args, *node.args.kwonlyargs)), node.returns)
        if bare_arrays(annotation)
    ]
    assert not bare


def test_a_false_shape_is_found() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="boxes"):
        crop_resize(torch.zeros(2, 3, 8, 8), torch.zeros(3, 4, dtype=torch.int64), 4)


def test_at_most_three_arguments_go_by_position() -> None:
    many = [
        name
        for path in FILES
        for name, node, bound in public_signatures(path)
        if len(node.args.posonlyargs + node.args.args) - bound > 3
    ]
    assert not many


def test_no_two_recipes_tell_the_same() -> None:
    """Six equal lines outside of imports belong to the room that both could ask."""
    stretches: dict[tuple[str, ...], str] = {}
    for path in sorted((ROOT / "recipes").glob("*.py")):
        text = path.read_text()
        code = [node for node in ast.parse(text).body if not isinstance(node, ast.Import | ast.ImportFrom)]
        lines = [line.strip() for node in code for line in ast.get_source_segment(text, node).splitlines()]
        lines = [line for line in lines if line]
        for start in range(len(lines) - 5):
            stretch = tuple(lines[start : start + 6])
            other = stretches.setdefault(stretch, path.name)
            assert other == path.name, f"{path.name} and {other} share {stretch}"
