"""Building indexes of files that have none: one parallel pass that can be broken off."""

from dataflow.indexing.building import IndexBuild, IndexProgress, build_index

__all__ = ["IndexBuild", "IndexProgress", "build_index"]
