"""A module says what is public: sorted, importable, documented; a facade's names stand in the reference."""

from __future__ import annotations

import doctest
import inspect
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
# What users import from; these names stay from release to release.
FACADES = [
    "cache",
    "connectors",
    "dataflow",
    "dataflow.convert",
    "dataflow.dataset",
    "dataflow.indexing",
    "dataflow.loaders",
    "dataflow.observe",
    "dataflow.order",
    "dataflow.transforms",
]


def _modules() -> dict[str, Path]:
    """Every module of the installed packages by name, found without importing any."""
    found = {}
    for package in ["cache", "connectors", "dataflow"]:
        root = Path(find_spec(package).origin).parent
        for file in sorted(set(root.rglob("*.py")) - set(root.rglob("__main__.py"))):
            parts = [package, *file.relative_to(root).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


MODULES = _modules()
PACKAGES = [name for name, file in MODULES.items() if file.name == "__init__.py"]
PUBLIC_MODULES = [name for name in MODULES if "._" not in name]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is(name: str) -> None:
    assert len(import_module(name).__doc__ or "") > 10


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_lists_its_public_names_in_order(name: str) -> None:
    public = getattr(import_module(name), "__all__", [])
    assert public == sorted(set(public))
    assert public or name not in FACADES


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_names_can_be_imported_and_have_docstrings(name: str) -> None:
    module = import_module(name)
    values = {public: getattr(module, public) for public in getattr(module, "__all__", [])}
    code = {public: value for public, value in values.items() if inspect.isclass(value) or inspect.isroutine(value)}
    ours = {public: value for public, value in code.items() if value.__module__ in MODULES}
    # A dataclass without a docstring makes one up that repeats its signature.
    undocumented = [
        public for public, value in ours.items() if (value.__doc__ or f"{public}(").startswith(f"{public}(")
    ]
    assert undocumented == []


@pytest.mark.parametrize("name", [name for name, file in MODULES.items() if ">>> " in file.read_text()])
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(import_module(name)).failed == 0


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_only_imports_and_lists(name: str) -> None:
    """Code in an `__init__.py` has no name of its own to be found under."""
    assert re.findall(r"^(?:class|async def|def) (?!__)\w+", MODULES[name].read_text(), flags=re.MULTILINE) == []


@pytest.mark.parametrize("facade", FACADES)
def test_every_public_name_of_a_facade_stands_in_the_reference(facade: str) -> None:
    """Once is enough: `dataflow.DataLoader` and `dataflow.loaders.DataLoader` are one thing."""
    pages = "\n".join(page.read_text() for page in REFERENCE.glob("*.md"))
    names = re.findall(r"^ *\.\. (?:auto|py:)\w+:: ([\w.]+)", pages, flags=re.MULTILINE)
    documented = {id(_resolve(name)) for name in names}
    public = import_module(facade).__all__
    assert [name for name in public if id(_resolve(f"{facade}.{name}")) not in documented] == []


def _resolve(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)
