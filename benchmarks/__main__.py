"""Prints our times against the best rival's: python -m benchmarks [operator ...] [--quick] [--out FILE.json]."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

import benchmarks
import convdit
from benchmarks.harness import as_json, measure, measure_machine


def operators() -> list[str]:
    return sorted(
        m.name.removeprefix("bench_") for m in pkgutil.iter_modules(benchmarks.__path__) if m.name.startswith("bench_")
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("operator", nargs="*", help=f"one of {', '.join(operators())}; all by default")
    parser.add_argument("--quick", action="store_true", help="shorter, so noisier")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the rows, the machine and the versions as JSON")
    arguments = parser.parse_args()
    unknown = set(arguments.operator) - set(operators())
    if unknown:
        parser.error(f"operator: expected some of {', '.join(operators())}, got {', '.join(sorted(unknown))}")

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    machine = measure_machine()
    info = convdit.build_info()
    print(
        f"{platform.processor() or platform.machine()}, {info['cpu_level']}, {arguments.threads} thread(s); "
        f"sgemm {machine.flops / 1e9:.0f} GFLOP/s, copy {machine.bytes / 1e9:.1f} GB/s; PyTorch {torch.__version__}"
    )
    print(f"{'operator':34} {'pass':12} {'shape':20} {'dtype':9} {'ours ms':>9} {'rival':>9} {'ms':>9} ratio ceiling")
    rows = []
    for name in arguments.operator or operators():
        module = importlib.import_module(f"benchmarks.bench_{name}")
        for comparison in module.comparisons():
            row = measure(comparison, machine, 0.3 if arguments.quick else 1.5)
            rows.append(row)
            print(
                f"{row.operator:34} {row.what:12} {row.shape:20} {row.dtype:9} {row.ours_ms:9.3f} {row.rival:>9} "
                f"{row.rival_ms:9.3f} {row.ratio:6.2f} {row.fraction:4.0%} of {row.ceiling}",
                flush=True,
            )
    if arguments.out:
        report = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {"cpu": platform.processor(), "flops": machine.flops, "bytes": machine.bytes},
            "versions": {"convdit": info, "torch": torch.__version__},
            "rows": [as_json(row) for row in rows],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
