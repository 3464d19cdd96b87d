"""Groups in one Arrow file that all ranks map: memory holds its pages once, and only those that are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2o.groups import Group, Response

# Number of groups that are written at once.
_BATCH = 256
# The `round` of the groups on which a training is monitored; that of a pool is 0, and online rounds count from 1.
PROBE = -1
_IDS = pa.list_(pa.int32())
_SIDE = pa.list_(pa.struct([("response_id", pa.string()), ("ids", _IDS), ("reference_logprob", pa.float64())]))
# `place` is a group's position in the order of its round; numbers may be left out. `reach` is how far back a token
# looks: the tokens of the prompt with its longest response.
_SCHEMA = pa.schema(
    [
        ("round", pa.int32()),
        ("place", pa.int32()),
        ("reach", pa.int32()),
        ("prompt_id", pa.string()),
        ("prompt", _IDS),
        ("positives", _SIDE),
        ("negatives", _SIDE),
    ]
)


class Writer:
    """Writes groups in any order; few are held at a time."""

    def __init__(self, path: Path):
        self._table, self._rows = pa.ipc.new_file(str(path), _SCHEMA), []

    def add(self, number: int, place: int, group: Group) -> None:
        """Append a group of the round of this number."""
        row = {
            "round": number,
            "place": place,
            "reach": len(group.prompt) + max(len(response.ids) for response in group.responses),
            "prompt_id": group.prompt_id,
            "prompt": group.prompt,
        }
        for side in ("positives", "negatives"):
            row[side] = [
                {
                    "response_id": response.response_id,
                    "ids": response.ids,
                    "reference_logprob": response.reference_logprob,
                }
                for response in getattr(group, side)
            ]
        self._rows.append(row)
        if len(self._rows) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        self._table.write_batch(pa.RecordBatch.from_pylist(self._rows, _SCHEMA))
        self._rows = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, failure, *_) -> None:
        if failure is None:
            self._flush()
        self._table.close()


class Groups(Sequence[Group]):
    """Groups in order, each made from the file on every access; its tokens stay in the file's pages."""

    def __init__(self, columns: dict[str, pa.ChunkedArray], rows: np.ndarray):
        """
        Args:
            columns: of the file.
            rows: int64, the row of each group.
        """
        self._columns, self._rows = columns, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Group:
        row = int(self._rows[place])
        prompt_id, prompt, *sides = (
            self._columns[name][row] for name in ("prompt_id", "prompt", "positives", "negatives")
        )
        positives, negatives = (list(_responses(side)) for side in sides)
        return Group(prompt_id.as_py(), prompt.values.to_numpy(), positives, negatives, row)

    def longest(self, count: int) -> list[Group]:
        """The groups in which a token looks back farthest, the farthest first."""
        reach = self._columns["reach"].to_numpy()[self._rows]
        return [self[place] for place in np.argsort(-reach, kind="stable")[:count]]


def _responses(side: pa.ListScalar) -> Iterator[Response]:
    names, ids, logprobs = side.values.flatten()
    tokens, ends = ids.values.to_numpy(), ids.offsets.to_pylist()
    for name, start, end, logprob in zip(names.to_pylist(), ends, ends[1:], logprobs.to_pylist(), strict=False):
        yield Response(name, tokens[start:end], logprob)


def read(path: Path, rounds: int) -> tuple[list[Groups], Groups]:
    """The groups of the pool and of each of `rounds` rounds, with those that it renewed; and the probe's groups."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    columns = {name: table[name] for name in table.column_names}
    numbers, places = (columns[name].to_numpy() for name in ("round", "place"))

    def ordered(number: int) -> np.ndarray:
        rows = np.flatnonzero(numbers == number)
        return rows[np.argsort(places[rows])]

    by_round = [ordered(0)]
    for number in range(1, rounds + 1):
        renewed, rows = ordered(number), by_round[0].copy()
        rows[np.searchsorted(places[rows], places[renewed])] = renewed
        by_round.append(rows)
    return [Groups(columns, rows) for rows in by_round], Groups(columns, ordered(PROBE))
