"""Where converted data came from, and what was done to it: what the manifest remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dataflow.convert.functions import Function
from dataflow.formats.protocol import TracedSource

if TYPE_CHECKING:
    from dataflow.convert.job import Work
    from dataflow.convert.survey import Survey

__all__ = ["lineage_of", "without_credentials"]


def lineage_of(work: Work, found: Survey, num_lost: int) -> dict[str, Any]:
    """Say where the data came from. No time and no host: equal conversions give equal manifests."""
    index = work.source.index
    source = {
        "url": work.origin or without_credentials(work.location),
        "format": "python" if work.origin else work.source.source.format,
        "fingerprint": index.fingerprint,
    }
    origin = work.source.source
    before = origin.lineage if isinstance(origin, TracedSource) else {}
    steps: dict[str, Any] = {}
    if work.filter is not None:
        steps["filter"] = work.filter.name if isinstance(work.filter, Function) else work.filter.text
    if work.cleaning is not None:
        steps["rules"] = [
            {"rule": row.rule, "kept": row.kept, "changed": row.changed, "dropped": row.dropped} for row in found.rules
        ]
    if work.mapping is not None:
        steps["map"] = work.mapping.function.name
    if num_lost:
        steps["lost"] = num_lost
    return {"source": source | ({"lineage": before} if before else {})} | steps


def without_credentials(url: str) -> str:
    """Drop user, password and query (signatures) from a URL that will be stored."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
