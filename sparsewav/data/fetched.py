"""Speech that is streamed from the hub, kept in the cache, so that no second run streams it again."""

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparsewav.cache import cached_folder
from sparsewav.data.utterances import Listing, Utterance

LISTING = "listing.json"


def fetched_once(identity: dict[str, Any], stream: Callable[[], Listing]) -> Listing:
    """Give what a stream brings, which is asked for once and then read from files.

    Args:
        identity: What tells this stream from every other one: the data set, the split, the size and seed of a sample.
        stream: Gives utterances, none of them broken, in their order.
    """

    def write(folder: Path) -> None:
        listing = stream()
        rows = []
        for number, item in enumerate(listing.utterances):
            row = {key.name: getattr(item, key.name) for key in fields(item) if key.name != "audio"}
            row["file"] = f"{number:06}-{re.sub(r'[^A-Za-z0-9_.-]', '_', item.id)}"
            (folder / row["file"]).write_bytes(item.contents())
            rows.append(row)
        record = {"recognised": listing.recognised, "utterances": rows}
        (folder / LISTING).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")

    folder, _ = cached_folder("speech", identity, write, enabled=True)
    record = json.loads((folder / LISTING).read_text(encoding="utf-8"))
    utterances = [Utterance(audio=folder / row.pop("file"), **row) for row in record["utterances"]]
    return Listing(utterances, recognised=record["recognised"])
