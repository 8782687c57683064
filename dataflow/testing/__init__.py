"""For tests of Dataflow and of what is built on it."""

from dataflow.testing.readers import CountingReader, PlannedReader, RecordedPlan

__all__ = ["CountingReader", "PlannedReader", "RecordedPlan"]
