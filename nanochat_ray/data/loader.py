"""Memory-mapped rows -> batches. Each epoch is a seeded permutation of the rows, so a position is one integer."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from nanochat_ray import storage
from nanochat_ray.data.mixture import Mixture
from nanochat_ray.node_cache import localize

if TYPE_CHECKING:
    import torch


def write_rows(uri: str, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
    """Write token rows (n, T+1), and the mask of the same shape, as an Arrow IPC file of one record batch.

    The file is written whole or not at all. Raises OSError.
    """
    if tokens.dtype not in (np.uint16, np.uint32):
        tokens = tokens.astype(np.uint16 if tokens.max(initial=0) < 1 << 16 else np.uint32)
    columns = {"tokens": tokens} if mask is None else {"tokens": tokens, "mask": mask.astype(np.uint8)}
    row_len = tokens.shape[1]
    arrays = [pa.FixedSizeListArray.from_arrays(pa.array(c.reshape(-1)), row_len) for c in columns.values()]
    batch = pa.record_batch(arrays, names=list(columns))
    with storage.writing(uri) as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def row_files(folder: str) -> list[str]:
    """URIs of a split's row files in order: those in the manifest, else all rows_*.arrow of the folder.

    A manifest may list files of other folders: 172 climbmix shards reuse the first 26 files of a run with 26 shards.
    """
    rows, split = storage.parent(folder), storage.name(folder)
    manifest_uri = storage.join(rows, "manifest.json")
    manifest = storage.read_json(manifest_uri) if storage.exists(manifest_uri) else {}
    if "splits" in manifest:
        listed = (name.rpartition("/") for name in manifest["splits"][split]["files"])
        return [
            storage.join(storage.parent(rows), other or storage.name(rows), split, file) for other, _, file in listed
        ]
    names = [name for name in storage.listdir(folder) if name.startswith("rows_") and name.endswith(".arrow")]
    return [storage.join(folder, name) for name in names]


class Rows:
    """All row files of one or more split folders as one memory-mapped table of token rows."""

    def __init__(self, *folders: str):
        """Raises FileNotFoundError if a folder has no row files, ValueError if one is damaged or differs in shape."""
        uris, files = [], []
        for folder in folders:
            of_folder = row_files(folder)
            if not of_folder:
                raise FileNotFoundError(f"no rows_*.arrow in {folder}: run `nanochat-ray prepare` first")
            uris.append(of_folder)
            files += [_map_columns(uri) for uri in of_folder]
        self.tokens = [columns["tokens"] for columns in files]
        self.masks = [columns["mask"] for columns in files if "mask" in columns]
        self.row_len = self.tokens[0].shape[1]
        if {tokens.shape[1] for tokens in self.tokens} != {self.row_len} or len(self.masks) not in (0, len(files)):
            raise ValueError(f"{', '.join(folders)}: row files differ in row length or columns; prepare them again")
        self.ends = np.cumsum([len(tokens) for tokens in self.tokens])
        ends_of_folders = self.ends[np.cumsum([len(of_folder) for of_folder in uris]) - 1]
        self.sizes = np.diff(ends_of_folders, prepend=0)  # rows of each folder
        for folder, size in zip(folders, self.sizes, strict=True):
            if not size:
                raise ValueError(f"{folder} has no rows: use more text or a shorter sequence_len")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, indices) -> np.ndarray:
        """Rows by global index: int64 (n, T+1)."""
        return self._gather(self.tokens, indices)

    def mask(self, indices) -> np.ndarray | None:
        """int64 (n, T+1), 1 where a token is learned. None if all tokens are learned."""
        return self._gather(self.masks, indices) if self.masks else None

    def _gather(self, files: list[np.ndarray], indices) -> np.ndarray:
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"row indices {indices.min()} … {indices.max()} are not all in 0 … {len(self) - 1}")
        owner = np.searchsorted(self.ends, indices, side="right")
        gathered = np.empty((len(indices), self.row_len), dtype=np.int64)
        for file in np.unique(owner):
            chosen = owner == file
            gathered[chosen] = files[file][indices[chosen] - (self.ends[file] - len(files[file]))]
        return gathered

    def batch(self, indices) -> tuple["torch.Tensor", "torch.Tensor"]:
        """(idx, targets), each an int64 tensor (n, T); targets are -1 where the mask is 0."""
        import torch  # imported here, because it takes seconds and prepare's workers don't need it

        rows, mask = torch.from_numpy(self[indices]), self.mask(indices)
        idx, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        return idx, targets if mask is None else targets.masked_fill(torch.from_numpy(mask)[:, 1:] == 0, -1)


def _map_columns(uri: str) -> dict[str, np.ndarray]:
    try:
        with pa.memory_map(str(localize(uri))) as source:  # the arrays keep the mapping; the file is closed
            batch = pa.ipc.open_file(source).get_batch(0)
        return {
            name: column.flatten().to_numpy().reshape(-1, column.type.list_size)
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
    except (pa.ArrowInvalid, AttributeError) as error:
        raise ValueError(f"{uri} is not a file of rows ({error}): remove it and prepare again") from None


class Loader:
    """Each step takes the next rows_per_step rows of the run, and each rank takes its slice of them.

    Row k of a source with n rows is permutation(seed, k // n, source)[k % n]. With several weights, each folder of the
    rows is a source with one weight, and a Mixture decides which source gives the next row.
    Rank r of W takes rows ⌊r·R/W⌋ … ⌊(r+1)·R/W⌋ − 1 of the R rows of a step. If W does not divide R, slices differ by
    one row.
    """

    def __init__(
        self,
        rows: Rows,
        rows_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 1337,
        weights: Sequence[float] = (1,),
    ):
        if rows_per_step < world_size:
            raise ValueError(f"{rows_per_step} rows per step are too few: {world_size} workers need one each")
        self.rows, self.rows_per_step, self.seed = rows, rows_per_step, seed
        self.slice = np.arange(rank * rows_per_step // world_size, (rank + 1) * rows_per_step // world_size)
        self.mixture = Mixture(weights, seed)
        self.sizes = [len(rows)] if len(weights) == 1 else rows.sizes
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # {source: (epoch, its permutation)}, the last one used

    def step(self, position: int) -> tuple["torch.Tensor", "torch.Tensor"]:
        """(idx, targets) of this rank for the step that begins at `position`, each int64 (rows of the rank, T).

        position: rows that all ranks have consumed since the run began. A step may span two epochs.
        """
        return self.rows.batch(self.indices(position))

    def indices(self, position: int) -> np.ndarray:
        """Global indices of this rank's rows, int64 (rows of the rank,)."""
        sources, numbers = self.mixture.find(position + self.slice)
        found = np.empty_like(numbers)
        for source in np.unique(sources):
            size, first, chosen = self.sizes[source], sum(self.sizes[:source]), sources == source
            epochs, within = np.divmod(numbers[chosen], size)
            rows = [self._permutation(source, epoch)[within[epochs == epoch]] for epoch in np.unique(epochs)]
            found[chosen] = first + np.concatenate(rows)
        return found

    def epoch(self, position: int) -> float:
        """How often a row was read on average."""
        return position / len(self.rows)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        if self._orders.get(source, (-1,))[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, int(epoch), int(source)]))
            self._orders[source] = epoch, generator.permutation(self.sizes[source])
        return self._orders[source][1]


class DeviceLoader:
    """Steps of a Loader on a device. For a GPU, a thread reads the next step's rows while the GPU computes.

    A step is copied as 32-bit ids from pinned memory, so that the copy does not block the GPU's queue. There are two
    such buffers, each reused after two steps. So a step must have ended on the GPU before the next but one begins.
    """

    def __init__(self, loader: Loader, device: "torch.device", ahead: bool | None = None):
        """ahead: read the next step in a thread. Default: only for GPUs, because on CPUs all cores compute."""
        self.loader, self.device = loader, device
        self.ahead = device.type == "cuda" if ahead is None else ahead
        self.buffers: list[torch.Tensor] = []
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self.next: tuple[int, Future] | None = None  # (position, rows) of the step being read

    def step(self, position: int) -> tuple["torch.Tensor", "torch.Tensor", int]:
        """(idx, targets, number of learned targets) of this rank for the step at `position`. Tensors are int64."""
        if not self.ahead:
            idx, targets = self.loader.step(position)
            return idx.to(self.device), targets.to(self.device), self._learned(targets)
        if self.next is None or self.next[0] != position:
            self.next = position, self.thread.submit(self._read, position)
        buffer, learned = self.next[1].result()
        idx, targets = buffer.to(self.device, non_blocking=True).long()
        after = position + self.loader.rows_per_step
        self.next = after, self.thread.submit(self._read, after)
        return idx, targets, learned

    def _read(self, position: int) -> tuple["torch.Tensor", int]:
        import torch

        rows = self.loader.step(position)
        if len(self.buffers) < 2:
            pinned = self.device.type == "cuda"
            buffer = torch.empty(2, *rows[0].shape, dtype=torch.int32, pin_memory=pinned)
        else:
            buffer = self.buffers.pop(0)
        self.buffers.append(buffer)
        for part, ids in zip(buffer, rows, strict=True):
            part.copy_(ids)
        return buffer, self._learned(rows[1])

    def _learned(self, targets: "torch.Tensor") -> int:
        return int((targets >= 0).sum()) if self.loader.rows.masks else targets.numel()


def evaluation_batches(
    rows: Rows, num_rows: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """Batches of a fixed random sample of num_rows rows, or of all if there are fewer. Each rank takes every W-th row.

    The sample is random because packing puts rows of long documents first.
    """
    sample = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))[:num_rows]
    mine = sample[rank::world_size]
    for start in range(0, len(mine), batch_size):
        yield rows.batch(mine[start : start + batch_size])
