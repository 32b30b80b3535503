"""The house: imports point down only; the lower floors need no torch; mmseg stays in its own room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    "codec",
    "store",
    "images",
    "tokenizers",
    "data",
    "augment",
    "models",
    "objectives",
    "engine",
    "plots",
    "cli",
]
GROUND = ["errors", "files", "tensors", "codebook"]  # what every floor stands on
FILES = sorted([*(ROOT / "seitpp").rglob("*.py"), *(ROOT / "recipes").glob("*.py")])


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor(parts: tuple[str, ...]) -> int:
    """Number of a module's floor; negative the ground, above all the package's front door and the recipes."""
    if len(parts) > 1 and parts[0] == "seitpp":
        if parts[1] in GROUND:
            return GROUND.index(parts[1]) - len(GROUND)
        if parts[1] in FLOORS:
            return FLOORS.index(parts[1])
    return len(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(ROOT).with_suffix("").parts
    for name in imports(path):
        assert not name.startswith("recipes"), f"{path}: imports a recipe"
        assert name.split(".")[0] not in {"mmseg", "mmcv", "mmengine"}, f"{path}: imports {name}"
        if name.split(".")[0] == "seitpp":
            wanted = floor(tuple(name.split(".")))
            # The front door re-exports the store; whoever asks it for a name asks for the store.
            wanted = FLOORS.index("store") if name in {"seitpp.TokenStore", "seitpp.StoreWriter"} else wanted
            wanted = -len(GROUND) if name == "seitpp.__version__" else wanted
            assert wanted <= floor(own), f"{path} (floor {floor(own)}) imports {name} (floor {wanted})"
            same_room = wanted != floor(own) or own[1:2] == tuple(name.split("."))[1:2] or wanted == len(FLOORS)
            assert same_room, f"{path} imports {name} from beside it"


def test_every_module_is_on_a_floor() -> None:
    rooms = {
        path.relative_to(ROOT / "seitpp").parts[0].removesuffix(".py")
        for path in FILES
        if "recipes" not in path.parts
    }
    assert rooms <= {*FLOORS, *GROUND, "__init__"}


def test_codec_and_store_import_without_torch() -> None:
    code = "import seitpp, seitpp.codec, seitpp.store, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_rule_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def late():\n    from seitpp.engine import run\n")
    assert imports(bad) == {"seitpp.engine.run"}
    assert floor(("seitpp", "engine", "run")) > floor(("seitpp", "codec", "ans"))
