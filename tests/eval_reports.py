"""Reports as `starkv eval` leaves them in a run."""

from __future__ import annotations

import json
from pathlib import Path

from starkv_core.eval.records import Record


def report(folder: Path, created: str, per_token: dict[str, float], records: list[Record]) -> None:
    """A report of ``records``, with the cache bytes a token of each subject."""
    folder = folder / "results"
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "schema": 1,
        "kind": "eval",
        "created": created,
        "results": [one.to_dict() for one in records],
        "groups": {},
    }
    for name, value in per_token.items():
        document[name] = {"cache": {"rows": 1, "tokens": 8, "held": 8 * value, "dense": 8000}}
    (folder / f"eval-{created}.json").write_text(json.dumps(document))
