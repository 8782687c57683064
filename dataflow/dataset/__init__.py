"""Datasets: sample numbers in, batches out."""

from dataflow.dataset.batch import Batch
from dataflow.dataset.dataset import Dataset
from dataflow.dataset.measures import read_measure
from dataflow.dataset.opening import open_dataset

__all__ = ["Batch", "Dataset", "open_dataset", "read_measure"]
