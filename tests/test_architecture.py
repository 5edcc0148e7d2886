"""The shape of the house, as tests: what may import what, what an import costs, what is public, what is shipped."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vit_mechinterp

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vit_mechinterp"

# A part imports the parts before it. Adapters stand aside: errors, spec and model alone.
ORDER = (
    "errors",
    "spec",
    "catalogue",
    "model",
    "engine",
    "stimuli",
    "training",
    "portable",
    "experiment",
    "figures",
    "circuits",
    "bridges",
    "report",
    "commands",
    "cli",
)
# So do the folders of the engine; a module that stands beside them may be imported by those that come after it.
ENGINE_ORDER = (
    "arrays",
    "files",
    "inputs",
    "binding",
    "reduction",
    "rows",
    "scheduling",
    "forwards",
    "results",
    "store",
    "planning",
    "training",
    "backends",
    "work",
    "execute",
)
ADAPTERS_MAY_IMPORT = {"errors", "spec", "model", "adapters"}
HEAVY = {"timm", "transformers", "datasets", "pandas", "matplotlib", "torch", "sklearn", "accelerate"}


def sources() -> dict[str, str]:
    """Every module of the package by path, the adapters under the name they are shipped with."""
    files = {str(path.relative_to(ROOT)): path for path in PACKAGE.rglob("*.py")}
    files |= {f"vit_mechinterp/adapters/{path.name}": path for path in (ROOT / "adapters").glob("*.py")}
    return {name: path.read_text(encoding="utf-8") for name, path in sorted(files.items())}


def part_of(module: str) -> str:
    """``vit_mechinterp.spec.sites`` stands in the part ``spec``."""
    return [*module.split("."), ""][1]


def imported_parts(source: str) -> Iterator[tuple[str, int]]:
    """Every part of the package that a source imports, at any depth, with the line."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "vit_mechinterp":
            # A public name counts as the part it lives in.
            homes = vit_mechinterp._HOME_OF
            names = [homes.get(alias.name, f"vit_mechinterp.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in ("vit_mechinterp", "adapters"):
                yield part_of(name), node.lineno


def wrong_imports(files: dict[str, str]) -> list[str]:
    """Imports that point the wrong way, as ``path:line imports part``."""
    wrong = []
    for path, source in files.items():
        own = part_of(path.removesuffix(".py").replace("/", "."))
        if own in ("__init__", ""):
            continue
        assert own in (*ORDER, "adapters"), f"{path}: the part {own!r} has no place in the order"
        allowed = ADAPTERS_MAY_IMPORT if own == "adapters" else {*ORDER[: ORDER.index(own) + 1], "__version__"}
        wrong += [f"{path}:{line} imports {part}" for part, line in imported_parts(source) if part not in allowed]
    return wrong


def test_imports_point_one_way() -> None:
    files = sources()
    assert len(files) > 20
    assert wrong_imports(files) == []


def wrong_imports_in_the_engine(files: dict[str, str]) -> list[str]:
    """Imports between the engine's folders that point the wrong way; annotations may name what comes later."""
    wrong = []
    for path, source in files.items():
        own = path.removeprefix("vit_mechinterp/engine/").removesuffix(".py").split("/")[0]
        allowed = ENGINE_ORDER[: ENGINE_ORDER.index(own) + 1]
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vit_mechinterp.engine"):
                continue
            parts = [name.split(".")[2] for name in [f"{node.module}.{alias.name}" for alias in node.names]]
            typed = source[: source.index(ast.get_source_segment(source, node) or "")].rstrip().endswith("if TYPE_CHECKING:")
            wrong += [f"{path}:{node.lineno} imports {part}" for part in parts if part not in allowed and not typed]
    return wrong


def test_imports_in_the_engine_point_one_way() -> None:
    files = {path: source for path, source in sources().items() if path.startswith("vit_mechinterp/engine/")}
    del files["vit_mechinterp/engine/__init__.py"]
    assert len(files) > 70
    assert wrong_imports_in_the_engine(files) == []
    for path, source in (
        ("vit_mechinterp/engine/rows/x.py", "from vit_mechinterp.engine.scheduling.reads import all_of"),
        ("vit_mechinterp/engine/rows/x.py", "def f():\n    from vit_mechinterp.engine import planning"),
        ("vit_mechinterp/engine/inputs/x.py", "import os\nfrom vit_mechinterp.engine import plan"),
    ):
        assert len(wrong_imports_in_the_engine({path: source})) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vit_mechinterp/spec/x.py", "from vit_mechinterp.engine import plan"),
        ("vit_mechinterp/spec/x.py", "def f():\n    import vit_mechinterp.model.hooked"),
        ("vit_mechinterp/model/x.py", "from vit_mechinterp import execute"),
        ("vit_mechinterp/engine/x.py", "import vit_mechinterp"),
        ("vit_mechinterp/engine/x.py", "from vit_mechinterp.circuits.result import CircuitResult"),
        ("vit_mechinterp/engine/x.py", "import adapters"),
        ("vit_mechinterp/adapters/x.py", "from vit_mechinterp.engine import plan"),
        ("vit_mechinterp/engine/x.py", "def f():\n    from vit_mechinterp.bridges.hooks import attend"),
        ("vit_mechinterp/circuits/x.py", "import vit_mechinterp.bridges"),
    ],
)
def test_the_test_of_imports_can_fail(path: str, source: str) -> None:
    assert len(wrong_imports({path: source})) == 1


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after ``code``."""
    command = f"import sys\n{code}\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


BRIDGED = {"nnsight", "pyvene", "transformer_lens"}


def bridged(source: str) -> set[str]:
    """The bridged packages that a source imports, at any depth."""
    nodes = list(ast.walk(ast.parse(source)))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {module.split(".")[0] for module in modules} & BRIDGED


def test_a_bridged_package_is_imported_by_its_own_bridge_alone() -> None:
    found = {path: packages for path, source in sources().items() if (packages := bridged(source))}
    assert set().union(*found.values()) == BRIDGED
    for path, packages in found.items():
        (package,) = packages
        assert path.startswith(f"vit_mechinterp/bridges/{package}")
    assert bridged("def f():\n    import nnsight.modeling") == {"nnsight"}
    assert not BRIDGED & modules_after(
        "import vit_mechinterp as vmi, vit_mechinterp.cli, vit_mechinterp.bridges.hooks, vit_mechinterp.bridges.parity\n"
        "import vit_mechinterp.circuits, vit_mechinterp.report; dir(vmi.bridges); vmi.execute"
    )


def test_importing_the_package_is_light() -> None:
    assert not HEAVY & modules_after("import vit_mechinterp; dir(vit_mechinterp)")
    assert "pandas" in modules_after("import pandas")


def test_specs_import_no_torch() -> None:
    loaded = modules_after(
        "import vit_mechinterp as vmi, vit_mechinterp.spec\n"
        "vmi.Run(name='r', interventions=[vmi.Interchange(site='embed', source='s')], capture=['logits']).digest"
    )
    assert not (HEAVY | {"numpy", "scipy"}) & loaded
    assert "pydantic" in loaded


def test_models_and_engine_import_no_model_library_and_no_plotting() -> None:
    loaded = modules_after("import vit_mechinterp as vmi; vmi.load, vmi.execute")
    assert not (HEAVY - {"torch"}) & loaded
    assert "torch" in loaded


def test_the_public_names_are_these() -> None:
    assert vit_mechinterp.__all__ == [
        "Ablate",
        "ActivationStore",
        "AddDirection",
        "Capture",
        "CrossEntropy",
        "Experiment",
        "HookedViT",
        "InjectSubspace",
        "Interchange",
        "Intervention",
        "Plan",
        "Results",
        "Run",
        "RunSource",
        "SelectedLogits",
        "Sweep",
        "TensorRef",
        "__version__",
        "execute",
        "load",
        "plan",
        "register",
        "register_adapter",
        "register_op",
        "run_experiment",
        "wrap",
    ]
    for name in vit_mechinterp.__all__:
        assert getattr(vit_mechinterp, name) is not None
    assert set(vit_mechinterp.__all__) <= set(dir(vit_mechinterp))
    assert issubclass(vit_mechinterp.errors.SpecError, vit_mechinterp.errors.VitMechInterpError)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        vit_mechinterp.lode  # noqa: B018


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLERS = {"torch.load", "torch.save", "numpy.load", "np.load", "pandas.read_pickle", "pd.read_pickle"}


def pickling(source: str) -> list[int]:
    """The lines of a source that could read or write a pickle."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = any(alias.name.split(".")[0] in PICKLES for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found = module.split(".")[0] in PICKLES or any(f"{module}.{a.name}" in UNPICKLERS for a in node.names)
        elif isinstance(node, ast.Attribute):
            found = ast.unparse(node) in UNPICKLERS or node.attr in ("read_pickle", "to_pickle")
        else:
            # numpy's option; the package's own load has one of that name, for users to set.
            asked = isinstance(node, ast.Call) and any(word.arg == "allow_pickle" for word in node.keywords)
            found = asked and ast.unparse(node.func) != "load"
        if found:
            lines.append(getattr(node, "lineno", 0))
    return lines


def test_nothing_is_pickled() -> None:
    assert {path: lines for path, source in sources().items() if (lines := pickling(source))} == {}
    for source in ("import pickle", "from torch import load", "torch.load(f)", "frame.to_pickle(f)", "zip(f, allow_pickle=True)"):
        assert pickling(source) == [1]


def test_files_are_short() -> None:
    folders = (PACKAGE, ROOT / "adapters", ROOT / "tests", ROOT / "benchmarks")
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in folder.rglob("*.py")
    }
    assert {path: length for path, length in lengths.items() if length >= 400} == {}


def test_every_direct_dependency_is_pinned_once_by_name_and_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    pins = [re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][0-9A-Za-z.]*)", line) for line in lines]
    assert all(pins)
    names = [normalised(pin[1]) for pin in pins if pin]
    assert len(set(names)) == len(names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    direct = [*project["dependencies"], *extras["bridges"], *extras["realistic"], *extras["test"], *extras["lint"]]
    wanted = {normalised(re.split(r"[^A-Za-z0-9_.-]", entry)[0]) for entry in direct}
    wanted -= {"setuptools", project["name"]}
    assert wanted - set(names) == set()


def normalised(name: str) -> str:
    """The one spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_wheel_holds_what_the_tree_holds(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("vit_mechinterp", "adapters", "examples"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    links = {name: ROOT / name for name in ("adapters", "examples")}
    assert all((tree / "vit_mechinterp" / name).is_symlink() for name in links)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(tree)]
    subprocess.run(command, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "vit-mechinterp = vit_mechinterp.cli:main" in archive.read(entry_points).decode()
    expected = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not {*path.relative_to(PACKAGE).parts} & {*links}
    }
    expected |= {f"vit_mechinterp/adapters/{path.name}" for path in links["adapters"].glob("*.py")}
    expected |= {f"vit_mechinterp/examples/{path.name}" for path in links["examples"].iterdir() if path.suffix in (".yaml", ".safetensors")}
    assert shipped == expected


def test_adapters_cannot_be_imported_by_the_wrong_name() -> None:
    done = subprocess.run([sys.executable, "-c", "import adapters"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "import vit_mechinterp.adapters" in done.stderr
