"""The last step of a conversion: manifests, which make datasets of finished shards, and no more records."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dataflow.convert.rejects import QUARANTINE_SCHEMA, quarantine_target
from dataflow.formats.destination import PART_SUFFIX, Destination

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dataflow.convert.job import ShardJob, Work
    from dataflow.formats.protocol import Part

__all__ = ["SURVEY_NAME", "publish_all", "publish_quarantine", "remove_records"]

# What a survey leaves at the destination: a record, and digests that it vouches for.
SURVEY_NAME = re.compile(r"survey-[a-z]+-\d{5,}(\.digests|\.part)")


def publish_all(
    work: Work, destination: Destination, jobs: Sequence[ShardJob], parts: Sequence[Part], lineage: dict[str, Any]
) -> None:
    """Write the manifest of every dataset; shards without samples are part of none.

    Args:
        work: The conversion.
        destination: Holds all shards.
        jobs: Of the shards.
        parts: What each of them returned.
        lineage: Where the data came from.
    """
    assert work.schema is not None
    for place, choice in enumerate(work.choices):
        shards = {
            job.name.removeprefix(choice.prefix): part["shard"]
            for job, part in zip(jobs, parts, strict=True)
            if job.choice == place and part["num_samples"]
        }
        drawn: dict[str, Any] = {"split": choice.name} if choice.name else {}
        if choice.share < 1 or choice.shuffled:
            drawn |= {"seed": choice.seed}
        with ExitStack() as stack:
            folder = destination
            if choice.name:
                folder = stack.enter_context(Destination(f"{work.url}/{choice.name}"))
            work.target.publish(folder, work.schema, shards, lineage | drawn)


def publish_quarantine(work: Work, shards: Mapping[str, dict[str, Any]]) -> bool:
    """Make a dataset of the rejected samples; False where there are none."""
    if not shards:
        return False
    with Destination(work.quarantine_url) as destination:
        parts = {entry["name"]: entry["shard"] for entry in shards.values()}
        quarantine_target().publish(destination, QUARANTINE_SCHEMA, parts, {"rejected_from": work.plan})
    return True


def remove_records(destination: Destination) -> None:
    """Remove what made the conversion resumable. Killed meanwhile, it can still be resumed from what is left.

    A survey's record goes before its digests; those of shards go last, because without any the dataset counts as
    finished.
    """
    names = [name for name in destination.sizes() if name.endswith(PART_SUFFIX) or SURVEY_NAME.fullmatch(name)]
    destination.delete(
        sorted(names, key=lambda name: (not SURVEY_NAME.fullmatch(name), not name.endswith(PART_SUFFIX)))
    )
