"""Transfers as tables: one per link and batch, a row per mode."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_transfers(results: dict[str, Any], console: Console) -> None:
    """Times as they are and over those with all experts resident, experts active, and what went over the link."""
    for batch, active in results["active"].items():
        console.print(
            f"batch {batch}: {active['over_all']:.0%} of a layer's experts are used by the batch, "
            f"{active['per_prompt']:.0%} by a prompt and its answer, {active['per_step']:.0%} by a decode step",
            highlight=False,
        )
    for link in ("machine", "modelled"):
        for batch in results["batches"]:
            rows = [row for row in results["rows"] if row["link"] == link and row["batch"] == batch]
            if rows:
                everything = [row for row in results["rows"] if row["mode"] == "all" and row["batch"] == batch]
                console.print(_table(_title(results, link, batch), rows, everything))


def _title(results: dict[str, Any], link: str, batch: int) -> str:
    over = "the machine's own link" if link == "machine" else f"a modelled link of {results['link_gbps']:g} GB/s"
    return f"batch {batch}, {results['steps']} tokens per answer, {over}"


def _table(title: str, rows: list[dict[str, Any]], everything: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("mode", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    reference = everything[0] if everything else None
    for row in rows:
        table.add_row(row["mode"], *(form(row, reference) for form in _COLUMNS.values()))
    return table


def _milliseconds(name: str) -> Any:
    return lambda row, _: f"{1e3 * row[name]:.1f}"


def _ratio(name: str) -> Any:
    return lambda row, reference: "" if reference is None else f"{row[name] / reference[name]:.2f}x"


def _share(name: str) -> Any:
    return lambda row, _: "" if row[name] is None else f"{row[name]:.1%}"


_COLUMNS: dict[str, Any] = {
    "token, ms": _milliseconds("token_seconds"),
    "of all": _ratio("token_seconds"),
    "request, ms": _milliseconds("request_seconds"),
    " of all": _ratio("request_seconds"),
    "experts, MB": lambda row, _: f"{row['expert_bytes'] / 1e6:.1f}",
    "transfer, ms": _milliseconds("transfer_seconds"),
    "waited, ms": _milliseconds("waited_seconds"),
    "compute, ms": _milliseconds("compute_seconds"),
    "missed": _share("missed_share"),
    "loads": lambda row, _: f"{row['loads']:.0f}",
    "replaced": _share("substituted"),
    "spared": _share("spared_share"),
    "useless": _share("useless_share"),
}
