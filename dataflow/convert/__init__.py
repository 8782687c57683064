"""Conversion: any dataset that can be read, written as another."""

from dataflow.convert.conversion import Conversion, convert
from dataflow.convert.progress import Progress

__all__ = ["Conversion", "Progress", "convert"]
