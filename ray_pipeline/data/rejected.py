"""Images and tiles that cannot be used: named with their reason, counted, and never dropped in silence."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

#: the list beside a data set or a latent store
REJECTED_FILE = "rejected.csv"
_NAMED = 5  # so many stand in a message


@dataclass(frozen=True)
class Rejected:
    """A tile (id) or a whole image (id ""), the file that is wrong, and why."""

    id: str
    path: str
    reason: str


def rejected_csv(rows: Sequence[Rejected]) -> bytes:
    """The rows as CSV (id, path, reason) in UTF-8."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "path", "reason"))
    writer.writerows((row.id, row.path, row.reason) for row in rows)
    return text.getvalue().encode(errors="backslashreplace")


def in_words(rows: Sequence[Rejected]) -> str:
    """The first of the rows, for a message."""
    first = "; ".join(f"{row.path}: {row.reason.removeprefix(row.path + ': ').rstrip('.')}" for row in rows[:_NAMED])
    return first + ("; ..." if len(rows) > _NAMED else "")
