"""Which tile each row is: an Arrow file beside the latents, so that a billion tiles need no memory to look one up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from ray_pipeline.data.latents import DataSet
from ray_pipeline.errors import UserError
from ray_pipeline.sections import PARTNER_TYPES
from ray_pipeline.storage import Folder

_DATASETS = b"datasets"


@dataclass(frozen=True)
class TileRow:
    """One tile: its id, file, and the files of its partners by hint name; paths relative to the data root.

    psf_fwhm_px: how wide its microscope sees a point, 0 where the manifest does not tell.
    """

    id: str
    path: str
    partners: dict[str, tuple[str, ...]]
    psf_fwhm_px: float = 0.0


class TileTable:
    """Rows of one split, in the order of the plan's ids. Cheap to pickle: opened where it is read."""

    def __init__(self, folder: Folder, name: str):
        self.folder, self.name = folder, name
        try:
            local = folder.local
            source = pa.memory_map(str(local / name)) if local is not None else pa.py_buffer(folder.read(name))
            self.table = pa.ipc.open_file(source).read_all()
            self.datasets = tuple(DataSet(**entry) for entry in json.loads(self.table.schema.metadata[_DATASETS]))
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"table of tiles {folder.where(name)} is missing or damaged ({' '.join(str(error).split())[:200]}); "
                "run `ray-pipeline encode --overwrite` (it keeps every whole shard)"
            ) from error

    def __reduce__(self):
        return TileTable, (self.folder, self.name)

    def __len__(self) -> int:
        return self.table.num_rows

    def rows(self, ids: Sequence[int]) -> list[TileRow]:
        """Tiles of these rows."""
        taken = self.table.take(pa.array(np.asarray(ids, dtype=np.int64)))
        return [
            TileRow(row["id"], row["path"], {h: tuple(row[h]) for h in PARTNER_TYPES if row[h]}, row["psf_fwhm_px"])
            for row in taken.to_pylist()
        ]


def write_tile_table(folder: Folder, name: str, rows: Sequence[TileRow], datasets: Sequence[DataSet]) -> None:
    """Write the rows of one split, whole or not at all."""
    columns = {"id": [row.id for row in rows], "path": [row.path for row in rows]}
    columns |= {hint: [row.partners.get(hint, ()) for row in rows] for hint in PARTNER_TYPES}
    columns["psf_fwhm_px"] = [row.psf_fwhm_px for row in rows]
    kinds = [pa.string(), pa.string(), *[pa.list_(pa.string())] * len(PARTNER_TYPES), pa.float64()]
    schema = pa.schema(
        list(zip(columns, kinds, strict=True)),
        metadata={_DATASETS: json.dumps([asdict(entry) for entry in datasets])},
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema))
    folder.write(name, memoryview(sink.getvalue()))
