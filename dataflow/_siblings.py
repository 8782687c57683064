"""Plain package names can be shadowed: a user's own `cache.py` beside the training script would be imported instead."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

__all__ = ["check_siblings"]


def check_siblings(names: tuple[str, ...] = ("cache", "connectors")) -> None:
    """Insist that the packages this one stands on are those installed beside it.

    Raises:
        ImportError: Another module of that name comes first on the path; names its file.
    """
    home = Path(__file__).resolve().parent.parent
    for name in names:
        spec = find_spec(name)
        found = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if found != home / name / "__init__.py":
            place = "a folder without __init__.py" if spec is not None and found is None else found or "nothing"
            raise ImportError(
                f"dataflow needs its own package {name!r} from {home / name}, but Python finds {place}; "
                f"rename that module, or start the script from another folder",
                name=name,
                path=None if found is None else str(found),
            )
