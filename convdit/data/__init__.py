"""Data for the commands: one interface over embedded sets, arrays, IDX, pictures, Hugging Face."""

from .dataset import ImageDataset, LazyDataset, MemoryDataset, few_labels, stratified_split
from .errors import DataError
from .loading import EMBEDDED, Splits, load

__all__ = [
    "EMBEDDED",
    "DataError",
    "ImageDataset",
    "LazyDataset",
    "MemoryDataset",
    "Splits",
    "few_labels",
    "load",
    "stratified_split",
]
