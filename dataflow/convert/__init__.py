"""Conversion: any dataset that can be read, written as another."""

from dataflow.convert.appending import append
from dataflow.convert.cleaning import parse_rule, read_rules
from dataflow.convert.conversion import convert
from dataflow.convert.progress import Progress
from dataflow.convert.result import Conversion, RuleCount, SplitResult

__all__ = ["Conversion", "Progress", "RuleCount", "SplitResult", "append", "convert", "parse_rule", "read_rules"]
