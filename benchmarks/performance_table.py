"""The tables of docs/performance.md from what `nextvec bench ... --json` wrote.

python benchmarks/performance_table.py docs/results/bench/*.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextvec.bench.show import NAMES
from nextvec.files import read_json


def rows(path: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """(bench, arm, figures of the arm) of one file."""
    found = read_json(path, "benchmark")
    return [(found["bench"], arm, figures) for arm, figures in found["arms"].items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    table = [row for path in parser.parse_args().files for row in rows(path)]
    print("| bench | arm | tokens/s | ms | share of the limit | GFLOP/s | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for bench, arm, found in table:
        rate, seconds, peak = found["tokens_per_s"]["median"], found["seconds"]["median"], found["peak_bytes"]
        cells = [
            f"{rate:,.0f}",
            f"{1e3 * seconds:,.0f}",
            f"{found['share_of_limit']:.0%}",
            f"{found['flops_per_s'] / 1e9:,.0f}",
        ]
        cells.append("-" if peak is None else f"{peak / 2**20:,.0f}")
        print(f"| {bench} | {NAMES.get(arm, arm)} | {' | '.join(cells)} |")
    names = list(dict.fromkeys(part for _, _, found in table for part in found["breakdown"]))
    print(f"\n| ms of | {' | '.join(names)} |")
    print("|---|" + "---|" * len(names))
    for bench, arm, found in table:
        whole = 1e3 * found["seconds"]["median"]
        cells = [
            f"{whole * found['breakdown'][name]['share']:,.0f}" if name in found["breakdown"] else "" for name in names
        ]
        print(f"| {bench}, {NAMES.get(arm, arm)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
