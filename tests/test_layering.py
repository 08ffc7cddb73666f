"""The rooms of the library and the direction of imports between them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dynarank"
MAX_LINES = 400

# A room is a file or a folder below src/dynarank. A row imports only from rows above it; siblings are blind to each
# other; the files of one folder may import each other.
ROWS = (
    ("errors",),
    ("_discovery", "_files", "_tables"),
    ("linalg", "cost"),
    ("factors", "events", "tucker"),
    ("layers", "integrators", "ranks", "schedules", "switches"),
    ("cost_model", "measure"),
    ("factorize", "distributed", "diagnostics", "stability", "robust"),
    ("optim",),
    ("compress", "adapters", "calibration", "dense_start", "history", "checkpoint", "export", "memory"),
    ("analysis", "elastic"),
    ("report",),
    ("integrations", "data", "models"),
    ("experiments",),
    ("cli",),
)
ROW_OF = {room: index for index, row in enumerate(ROWS) for room in row}
EXEMPT = ("__init__", "__main__")  # the front page and the door of the command line see every room

REQUIRED = ("torch", "safetensors")
# Import name of each optional dependency. Only these may be imported inside a function.
OPTIONAL = (
    "PIL",
    "accelerate",
    "lightning",
    "matplotlib",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pyarrow",
    "rich",
    "sklearn",
    "transformers",
    "tyro",
)
ALLOWED = frozenset((*sys.stdlib_module_names, "dynarank", *REQUIRED, *OPTIONAL))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def find_imports(tree: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield every import statement with whether it stands inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, in_function
        else:
            yield from find_imports(node, in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imported_modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return the dotted modules a statement names; for ``from dynarank import x`` that is ``dynarank.x``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if node.module == "dynarank":
        return [f"dynarank.{alias.name}" for alias in node.names]
    return [node.module or ""]


def check_direction(room: str, module: str) -> str | None:
    """Return what is wrong with an import of ``module`` by ``room``, or None."""
    target = [*module.split("."), ""][1]
    if target == room:
        return None
    if target not in ROW_OF:
        return f"imports {module}, which is no room; name the module that defines it, not the front page"
    if ROW_OF[target] == ROW_OF[room]:
        return f"{room} imports its sibling {target}"
    if ROW_OF[target] > ROW_OF[room]:
        return f"{room} imports {target}, which is below it"
    return None


def check_statement(room: str, node: ast.Import | ast.ImportFrom, in_function: bool) -> Iterator[str]:
    """Yield what is wrong with one import statement."""
    if isinstance(node, ast.ImportFrom) and node.level:
        yield "imports relatively; write the absolute name"
        return
    if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
        yield f"imports * from {node.module}"
    for module in imported_modules(node):
        package = module.partition(".")[0]
        if package not in ALLOWED:
            yield f"imports {package}, which is neither a dependency nor an extra of dynarank"
        elif in_function and package not in OPTIONAL:
            yield f"imports {module} inside a function; only an optional dependency belongs there"
        elif package == "dynarank" and room not in EXEMPT and (fault := check_direction(room, module)):
            yield fault


def check_source(text: str, *, room: str, name: str) -> list[str]:
    """Return every fault of one file as ``file:line: what``."""
    if room not in (*ROW_OF, *EXEMPT):
        return [f"{name}:1: {room} is in no row; add it to ROWS in tests/test_layering.py"]
    return [
        f"{name}:{node.lineno}: {fault}"
        for node, in_function in find_imports(ast.parse(text))
        for fault in check_statement(room, node, in_function)
    ]


def test_imports_point_up_the_rows():
    faults = [
        fault
        for path in sorted(SOURCE.rglob("*.py"))
        for fault in check_source(path.read_text(), room=room_of(path), name=str(path.relative_to(ROOT)))
    ]
    assert not faults, "\n" + "\n".join(faults)


def test_no_file_is_longer_than_the_limit():
    lengths = {
        path.relative_to(ROOT): len(path.read_text().splitlines())
        for folder in (SOURCE, ROOT / "tests")
        for path in sorted(folder.rglob("*.py"))
    }
    faults = [
        f"{path}:{MAX_LINES + 1}: {length} lines, at most {MAX_LINES}"
        for path, length in lengths.items()
        if length > MAX_LINES
    ]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("room", "text", "fault"),
    [
        ("layers", "from dynarank.ranks.budget import Budget", "layers imports its sibling ranks"),
        ("linalg", "import dynarank.cost", "linalg imports its sibling cost"),
        ("factors", "from dynarank import optim", "factors imports optim, which is below it"),
        ("history", "import os\nfrom dynarank.report import table", "history imports report, which is below it"),
        ("cli", "import dynarank", "imports dynarank, which is no room"),
        ("cli", "from dynarank import factorize_", "imports dynarank.factorize_, which is no room"),
        ("optim", "if True:\n    from dynarank.compress import x", "optim imports compress, which is below it"),
        ("models", "import torchvision.models", "imports torchvision, which is neither"),
        ("__init__", "from dynarank.layers import *", "imports * from dynarank.layers"),
        ("layers", "from . import linear", "imports relatively"),
        ("layers", "def f():\n    import torch", "imports torch inside a function"),
        ("layers", "class A:\n    async def f():\n        import math", "imports math inside a function"),
        ("wardrobe", "", "wardrobe is in no row"),
    ],
)
def test_a_forbidden_import_is_named_with_its_line(room: str, text: str, fault: str):
    (message,) = check_source(text, room=room, name="file.py")
    assert message.startswith(f"file.py:{max(1, len(text.splitlines()))}: {fault}")


@pytest.mark.parametrize(
    ("room", "text"),
    [
        ("layers", "from dynarank.layers.base import AbstractLowRankLayer"),
        ("report", "from dynarank.history import History"),
        ("optim", "from dynarank import linalg, factors"),
        ("report", "def plot():\n    import matplotlib.pyplot as plt"),
        ("__init__", "from dynarank.cli import main"),
        ("linalg", "import math\nfrom collections.abc import Sequence\nimport torch.nn.functional as F"),
    ],
)
def test_an_allowed_import_passes(room: str, text: str):
    assert check_source(text, room=room, name="file.py") == []


def run_python(code: str) -> str:
    """Return what a fresh interpreter prints for ``code``."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_works_without_the_extras():
    # None in sys.modules makes every import of that name fail as if it were not installed.
    without = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); import dynarank; "
    assert "factorize_" in run_python(without + "print(*dynarank.__all__)").split()


def test_import_loads_no_extra():
    # torch loads numpy where it finds it, so what the required packages bring is not ours.
    before = "import sys, torch, safetensors.torch; before = set(sys.modules); import dynarank; "
    loaded = run_python(before + f"print(*sorted({set(OPTIONAL)} & (set(sys.modules) - before)))")
    assert loaded.split() == []
