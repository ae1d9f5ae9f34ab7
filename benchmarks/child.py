"""Measures rows for the command, in a process of its own, since malloc's settings are fixed when a process starts.

Takes the selection as JSON in its argument. Says what the machine can do, then measures the row whose number it reads
from standard input, and answers with a line of JSON, until the input ends.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import traceback
from dataclasses import asdict

import torch

import convdit

from . import suite
from .harness import TooLong, measure
from .machine import describe, measure_machine


def main() -> None:
    # Libraries print to standard output as they like: the answers get a copy of it, and prints go to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    torch._logging.set_logs(all=logging.ERROR)  # a compiler's remarks are no part of the table
    given = suite.Selection(**json.loads(sys.argv[1]))
    torch.set_num_threads(given.threads)
    if given.device == "cuda":
        torch.set_default_device("cuda")
    comparisons = suite.comparisons(given)
    machine = measure_machine()
    versions = {"convdit": convdit.build_info(), **suite.versions()}
    answer(machine=asdict(machine), about=describe(), versions=versions)
    gc.freeze()  # what is there for good: it is not looked at after every row
    for line in sys.stdin:
        comparison = comparisons[int(line)].comparison
        torch.manual_seed(0)
        torch._dynamo.reset()  # each row compiles anew, and none reaches the limit of recompilations
        try:
            answer(row=measure(comparison, machine, given.malloc, given.seconds, given.quick).as_json())
        except (NotImplementedError, ImportError, TooLong) as error:  # not on this device, or a rival not installed
            answer(note=str(error).strip().splitlines()[0])
        except Exception:
            answer(error=traceback.format_exc())
        gc.collect()


if __name__ == "__main__":
    main()
