"""A benchmark's result for a reader at a terminal."""

from __future__ import annotations

from typing import Any

BUSY = 0.5  # of the cores: load average from which other work spoils the figures
NAMES = {"ours": "nextvec", "plain": "plain", "evaluate": "evaluation"}
NAMES |= {"t05": "T = 0.5", "t1": "T = 1", "plain_t05": "plain 0.5", "plain_t1": "plain 1"}


def lines(found: dict[str, Any]) -> list[str]:
    """A few lines from the JSON object of `run`."""
    machine, arms = found["machine"], found["arms"]
    load = next(iter(arms.values()))["load_average"]
    loads = "" if load[0] is None else f", load average {load[0]:.1f} to {load[1]:.1f}"
    head = f"bench {found['bench']}: {found['device']} {found['precision']}, {machine['threads']} threads{loads}"
    rows = [head]
    if load[0] is not None and load[0] > BUSY * machine["cores"]:
        rows.append(
            f"this machine was busy before: load average {load[0]:.1f} on {machine['cores']} cores; figures of an idle one differ"
        )
    for name, arm in arms.items():
        rate, seconds = arm["tokens_per_s"], arm["seconds"]["median"]
        rows.append(
            f"{NAMES[name]:<11}{rate['median']:>12,.0f} tokens/s ({rate['min']:,.0f} to {rate['max']:,.0f}), "
            f"{1e3 * seconds:,.1f} ms for {arm['tokens']:,} tokens, peak {_bytes(arm['peak_bytes'])}, "
            f"{arm['share_of_limit']:.0%} of the time is what its matrix products take alone, "
            f"{arm['flops_per_s'] / 1e9:,.0f} GFLOP/s"
        )
        pools = arm.get("pools")
        if pools is not None:
            rows.append(
                f"{'':<11}of {pools['candidates']} candidates {pools['unique']:.0%} are unique; {pools['unanimous']:.0%} of "
                "pools are unanimous"
            )
    ratios = found.get("ratios", {})
    if not ratios and found["ratio"] is not None:
        ratios = {"": {**found["repeats"]["ratio"], "median": found["ratio"]}}
    for name, ratio in ratios.items():
        title = f"ratio {NAMES.get(name, '')}"
        rows.append(f"{title:<14}{ratio['median']:>9.2f} ({ratio['min']:.2f} to {ratio['max']:.2f} in single repeats)")
    squares = [f"{row['dtype']} {row['side']}: {_rate(row['flops_per_s'])}" for row in found["limits"]["matmul"]]
    rows.append(
        f"square products in GFLOP/s: {', '.join(squares)}; memory {found['limits']['memory_bytes_per_s'] / 1e9:,.0f} GB/s"
    )
    for name, arm in arms.items():
        parts = [f"{part} {row['share']:.0%}" for part, row in arm["breakdown"].items()]
        rows.append(f"parts of {NAMES[name]}: {', '.join(parts)}")
    return rows


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:,.0f} MiB"


def _rate(flops_per_s: float | None) -> str:
    return "-" if flops_per_s is None else f"{flops_per_s / 1e9:,.0f}"
