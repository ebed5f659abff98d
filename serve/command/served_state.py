"""What `/v1/emoe/state` of a server says between two moments, and in one line."""

from typing import Any

NEEDED = {"wishes", "coverage", "loads", "share"}


def between(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a server did from one state to another: for all requests, not for one. None where a state is missing."""
    if before is None or after is None:
        return None
    first, last = before.get("residency", {}), after.get("residency", {})
    if not first.keys() & last.keys() >= NEEDED:
        return None
    wishes = [sum(map(sum, of["wishes"])) for of in (first, last)]
    hits = [count * (of["coverage"] or 0.0) for count, of in zip(wishes, (first, last), strict=True)]
    wished = wishes[1] - wishes[0]
    return {
        "resident_share": last["share"],
        "wishes": wished,
        "hits": round(hits[1] - hits[0]),
        "coverage": (hits[1] - hits[0]) / wished if wished > 0 else None,
        "loads": last["loads"]["loads"] - first["loads"]["loads"],
        "steps": after.get("steps", 0) - before.get("steps", 0),
    }


def residency_line(state: dict[str, Any] | None) -> str:
    """How much is resident now, what it covered so far, and what is on its way; nothing of another server."""
    residency = (state or {}).get("residency", {})
    if state is None or not residency.keys() >= NEEDED:
        return ""
    covered = "-" if residency["coverage"] is None else f"{residency['coverage']:.1%}"
    scheduler = state.get("scheduler", {})
    return (
        f"{residency['share']:.0%} of the experts resident · coverage {covered} · "
        f"{len(residency.get('loading', ()))} loading · {residency['loads']['loads']:,} loads so far · "
        f"{scheduler.get('running', 0)} running, {scheduler.get('waiting', 0)} waiting"
    )
