"""Speech that is streamed from the hub, kept in the cache, so that no second run streams it again."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparsewav.cache import cached_folder
from sparsewav.data.utterances import Utterance

LISTING = "utterances.jsonl"


def fetched_once(identity: dict[str, Any], stream: Callable[[], Iterable[Utterance]]) -> list[Utterance]:
    """Give what a stream brings, which is asked for once and then read from files.

    Args:
        identity: What tells this stream from every other one: the data set, the split, the size and seed of a sample.
        stream: Gives the utterances in their order.
    """

    def write(folder: Path) -> None:
        with (folder / LISTING).open("w", encoding="utf-8") as listing:
            for number, item in enumerate(stream()):
                record = {key.name: getattr(item, key.name) for key in fields(item) if key.name != "audio"}
                record["file"] = f"{number:06}-{re.sub(r'[^A-Za-z0-9_.-]', '_', item.id)}"
                (folder / record["file"]).write_bytes(item.contents())
                listing.write(json.dumps(record, ensure_ascii=False) + "\n")

    folder, _ = cached_folder("speech", identity, write, enabled=True)
    lines = (folder / LISTING).read_text(encoding="utf-8").split("\n")[:-1]
    return [Utterance(audio=folder / record.pop("file"), **record) for record in map(json.loads, lines)]
