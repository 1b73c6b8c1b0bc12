"""``python -m experiments.bench NAME [--rounds N] [--quick] [--out DIR]``: run a benchmark, print it, keep it as JSON.

A benchmark is a module of this package with ``run(options: Options) -> Report``.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments import bench
from experiments.bench.harness import RESULTS, Options
from sam.errors import SamError


def names() -> list[str]:
    """The benchmarks there are: the modules of this package, without the harness."""
    found = (module.name for module in pkgutil.iter_modules(bench.__path__))
    return sorted(name for name in found if name != "harness" and not name.startswith("_"))


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 after a one-line error."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=names())
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each with every contestant once (default 5)")
    parser.add_argument("--quick", action="store_true", help="a small workload, to see that it runs; not kept")
    parser.add_argument("--out", type=Path, help=f"folder of the JSON (default {RESULTS}, with --quick none)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} is below 1")
    try:
        module = importlib.import_module(f"experiments.bench.{args.name}")
        report = replace(module.run(Options(args.rounds, args.quick)), name=args.name)
    except SamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.show()
    out = args.out or (None if args.quick else RESULTS)
    if out is not None:
        print(report.write(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
