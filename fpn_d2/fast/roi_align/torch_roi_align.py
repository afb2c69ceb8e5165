"""Multi-level RoIAlign in pure torch, several times as fast as one ``roi_align`` per level on a CPU.

The average over a cell's sampling grid is separable: the bilinear weights of all positions in y are merged into one
weight per map row, those in x into one per column ("taps"). A pooled cell is then a weighted sum of rows of the map,
seen as a table (N * H * W, C): one ``embedding_bag`` per level. Its gradient is the same with the roles exchanged: a
row of the table is a weighted sum of the cells that used it, so one more ``embedding_bag``, over pairs sorted by row.
Both are deterministic.

Shape legend: M RoIs, L levels, (h, w) cells of a RoI, T taps of an axis, P pairs of a cell and a row of the table.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_MAX_POSITIONS = 1 << 21  # sampling positions worked out at once
_MAX_PAIRS = 1 << 22  # pairs of RoIs that are worked out at once
_MAX_VALUES = 1 << 19  # of cells summed at once: they stay in the processor's cache until they are where they belong


def torch_roi_align(
    maps: Sequence[Tensor],
    rois: Tensor,
    level_indices: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """:func:`fpn_d2.fast.roi_align.pyramid_roi_align` with ``implementation="torch"``, of checked arguments."""
    settings = (tuple(scales), tuple(output_size), sampling_ratio, aligned)
    return _Pool.apply(settings, rois.detach(), level_indices, *maps)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, rois, level_indices, *maps):
        output_size = settings[1]
        channels, dtype = maps[0].shape[1], maps[0].dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        pooled = maps[0].new_empty((len(rois), channels, *output_size))
        saved = []
        for level, level_map in enumerate(maps):
            rows = torch.nonzero(level_indices == level)[:, 0]
            if len(rows) == 0:
                continue
            table = level_map.to(wide).contiguous(memory_format=torch.channels_last)
            table = table.permute(0, 2, 3, 1).reshape(-1, channels)
            for pairs in _pairs(rois.to(wide), rows, level_map.shape, level, settings):
                for part_rois, cells in pairs.sum_by_cell(table, math.prod(output_size)):
                    cells = cells.view(-1, *output_size, channels).permute(0, 3, 1, 2)
                    pooled.index_put_((part_rois,), cells.to(dtype))
                saved.append((level, pairs))
        pooled[torch.nonzero(~torch.isfinite(rois).all(dim=1))[:, 0]] = torch.nan
        ctx.map_shapes, ctx.output_size = [level_map.shape for level_map in maps], output_size
        ctx.levels = [level for level, _ in saved]
        ctx.save_for_backward(*(tensor for _, pairs in saved for tensor in pairs.tensors()))
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        channels, dtype = gradient.shape[1], gradient.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cells = gradient.permute(0, 2, 3, 1)
        tables = [None] * len(ctx.map_shapes)
        for i, level in enumerate(ctx.levels):
            pairs = _Pairs(*ctx.saved_tensors[4 * i : 4 * i + 4])
            images, _, height, width = ctx.map_shapes[level]
            part_cells = cells.index_select(0, pairs.rois).to(wide).reshape(-1, channels)
            part = pairs.sum_by_table_row(part_cells, images * height * width)
            tables[level] = part if tables[level] is None else tables[level].add_(part)
        gradients = []
        for (images, _, height, width), table in zip(ctx.map_shapes, tables, strict=True):
            if table is None:
                table = gradient.new_zeros((images * height * width, channels))
            gradients.append(table.view(images, height, width, channels).permute(0, 3, 1, 2).to(dtype))
        return None, None, None, *gradients


@dataclass
class _Pairs:
    """Which rows of a level's table weigh how much in which cells of some RoIs; ordered by RoI and cell.

    Attributes:
        rois: (R,) the RoIs, as indices into all.
        begins: (R * h * w + 1,) where each cell's pairs begin.
        table_rows: (P,).
        weights: (P,).
    """

    rois: Tensor
    begins: Tensor
    table_rows: Tensor
    weights: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.rois, self.begins, self.table_rows, self.weights

    def sum_by_cell(self, table: Tensor, num_cells: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some of the RoIs and their cells, (R' * h * w, C): the rows of the table times their weights."""
        part = max(1, _MAX_VALUES // (num_cells * table.shape[1]))
        ends = self.begins[num_cells * part :: num_cells * part].tolist()
        ends += [len(self.table_rows)] * (len(ends) * part < len(self.rois))
        begin = 0
        for i, end in enumerate(ends):
            cells = slice(i * part * num_cells, (i + 1) * part * num_cells + 1)
            yield (
                self.rois[i * part : (i + 1) * part],
                F.embedding_bag(
                    self.table_rows[begin:end],
                    table,
                    self.begins[cells] - begin,
                    mode="sum",
                    per_sample_weights=self.weights[begin:end],
                    include_last_offset=True,
                ),
            )
            begin = end

    def sum_by_table_row(self, cells: Tensor, num_rows: int) -> Tensor:
        """From (R * h * w, C) cells, return (num_rows, C): for each row of the table, its cells times their weights."""
        integer = self.table_rows.dtype
        order = torch.sort(self.table_rows, stable=True)[1]
        begins = torch.zeros(num_rows + 1, dtype=integer, device=cells.device)
        begins[1:] = torch.bincount(self.table_rows, minlength=num_rows).cumsum(0)
        pair_cells = torch.repeat_interleave(self.begins.diff()).to(integer)
        return F.embedding_bag(
            _take(pair_cells, order),
            cells,
            begins,
            mode="sum",
            per_sample_weights=_take(self.weights, order),
            include_last_offset=True,
        )


def _pairs(rois: Tensor, rows: Tensor, map_shape: Sequence[int], level: int, settings: tuple) -> Iterator[_Pairs]:
    """Yield the pairs of the RoIs ``rows``, all of one level, in parts of bounded size."""
    scales, (out_height, out_width), sampling_ratio, aligned = settings
    images, _, height, width = map_shape
    integer = torch.int32 if images * height * width < 2**31 else torch.int64
    # In the order of torchvision's kernel, so that every rounding is the same: a position at -1 counts, one below not.
    start = rois[rows][:, 1:3] * scales[level] - (0.5 if aligned else 0.0)
    size = (rois[rows][:, 3:5] * scales[level] - (0.5 if aligned else 0.0)) - start
    if not aligned:
        size = size.clamp(min=1.0)
    cell_size = size / torch.tensor([out_width, out_height], dtype=size.dtype, device=size.device)
    samples = torch.full_like(cell_size, sampling_ratio) if sampling_ratio > 0 else cell_size.ceil()
    # Of similar size, so that little is padded. A RoI without samples in either axis (or with a NaN) is empty.
    samples = torch.where((samples > 0).all(dim=1, keepdim=True) & cell_size.isfinite(), samples, 0.0)
    largest, order = samples.amax(dim=1).sort(stable=True)
    largest = largest.clamp(min=1, max=2 * max(height, width) + 8).tolist()
    begin = 0
    while begin < len(rows):
        end = begin + 1
        while end < len(rows) and (end + 1 - begin) * max(out_height, out_width) * largest[end] <= _MAX_POSITIONS:
            end += 1
        part = order[begin:end]
        x = _Taps.of_axis(start[part, 0], cell_size[part, 0], samples[part, 0], out_width, width, integer)
        y = _Taps.of_axis(start[part, 1], cell_size[part, 1], samples[part, 1], out_height, height, integer)
        image = rois[rows[part], 0].to(integer)
        yield from _products(y, x, image * (height * width), width, rows[part])
        begin = end


@dataclass
class _Taps:
    """Which rows (or columns) of the map weigh how much in which cells of an axis; ordered by RoI and cell.

    Attributes:
        counts: (M, cells) taps of each cell.
        begins: (M, cells) where each cell's taps begin.
        at: (T,) row or column of the map.
        weights: (T,).
    """

    counts: Tensor
    begins: Tensor
    at: Tensor
    weights: Tensor

    @classmethod
    def of_axis(
        cls, start: Tensor, cell_size: Tensor, samples: Tensor, cells: int, size: int, integer: torch.dtype
    ) -> "_Taps":
        """Merge the bilinear weights of each cell's positions; ``samples`` of them per cell, on a map of ``size``."""
        cell = torch.arange(cells, dtype=start.dtype, device=start.device)
        cell_start = start[:, None] + cell * cell_size[:, None]
        first, window = _window(cell_start, cell_size[:, None], samples[:, None], size)
        sample = first[..., None] + torch.arange(window, dtype=start.dtype, device=start.device)
        step = (sample + 0.5) * cell_size[:, None, None] / samples[:, None, None]
        position = cell_start[..., None] + step
        valid = (position >= -1) & (position <= size) & (sample < samples[:, None, None])
        position = torch.where(valid, position, 0.0).clamp(min=0)
        low = position.to(torch.int64).clamp(max=size - 1)
        upper = torch.where(low == size - 1, 0.0, position - low)
        high = (low + 1).clamp(max=size - 1)
        # Scatter into a window of the map per cell. `touched` too: a weight of 0 still carries a NaN over.
        base = torch.where(valid, low, size).amin(dim=2, keepdim=True)
        extent = int(torch.where(valid, high - base, 0).max()) + 1
        weights = position.new_zeros((*base.shape[:2], extent))
        touched = torch.zeros(weights.shape, dtype=torch.bool, device=weights.device)
        share = valid / samples[:, None, None].clamp(min=1)  # of one position in the average
        for tap, weight in ((low, 1 - upper), (high, upper)):
            # Positions that do not count add 0 to the window's first cell, but do not touch it.
            index = torch.where(valid, tap - base, 0)
            weights.scatter_add_(2, index, weight * share)
            touched |= torch.zeros_like(touched, dtype=torch.int32).scatter_add_(2, index, valid.int()) > 0
        counts = touched.sum(dim=2)
        begins = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
        at = (base + torch.arange(extent, device=base.device))[touched]
        return cls(counts, begins, at.to(integer), weights[touched])


def _window(cell_start: Tensor, cell_size: Tensor, samples: Tensor, size: int) -> tuple[Tensor, int]:
    """Return the first position of each cell that can lie on the map, and how many to look at from there.

    A RoI far larger than the map has far more positions than the map has cells; those outside need no memory. The
    bounds are wide by a few positions, and each position is checked after that.
    """
    step = cell_size / samples
    ends = torch.stack([(-1 - cell_start) / step, (size - cell_start) / step])  # NaN in a RoI without samples
    slack = 4 + ends.abs() * 1e-6
    first = (ends - slack).amin(dim=0).nan_to_num(0, 0, 0).floor().clamp(min=0)
    last = (ends + slack).amax(dim=0).nan_to_num(0, 0, 0).ceil()
    first, last = torch.minimum(first, samples), torch.minimum(last, samples)
    return first, max(int((last - first).max()), 1)


def _products(y: _Taps, x: _Taps, first_row: Tensor, width: int, rois: Tensor) -> Iterator[_Pairs]:
    """Yield the pairs of RoIs: in each cell, every tap in y times every tap in x.

    Args:
        y: taps in y.
        x: taps in x.
        first_row: (M,) row of the table where each RoI's image begins.
        width: of the map.
        rois: (M,) indices.
    """
    integer = x.at.dtype
    ends = (y.counts.sum(dim=1) * x.counts.sum(dim=1)).cumsum(0).tolist()
    begin = 0
    while begin < len(rois):
        done = ends[begin - 1] if begin else 0
        end = begin + 1
        while end < len(rois) and ends[end] - done <= _MAX_PAIRS:
            end += 1
        part = slice(begin, end)
        shape = (end - begin, y.counts.shape[1], x.counts.shape[1])
        # First one entry per cell and tap in y, then from each entry one pair per tap in x.
        y_counts = y.counts[part, :, None].expand(shape).flatten()
        x_counts = x.counts[part, None, :].expand(shape).flatten()
        cell = torch.repeat_interleave(y_counts)
        nth = torch.arange(len(cell), device=cell.device) - _take(y_counts.cumsum(0) - y_counts, cell)
        y_tap = _take(y.begins[part, :, None].expand(shape).flatten(), cell) + nth
        entry_row = _take(y.at, y_tap) * width + _take(first_row[part, None, None].expand(shape).flatten(), cell)
        entry_counts = _take(x_counts, cell)
        entry_begins = entry_counts.cumsum(0) - entry_counts
        x_offset = (_take(x.begins[part, None, :].expand(shape).flatten(), cell) - entry_begins).to(integer)
        entry = torch.repeat_interleave(entry_counts)
        x_tap = _take(x_offset, entry) + torch.arange(len(entry), dtype=integer, device=cell.device)
        begins = torch.zeros(len(y_counts) + 1, dtype=integer, device=cell.device)
        begins[1:] = (y_counts * x_counts).cumsum(0)
        table_rows = _take(entry_row, entry) + _take(x.at, x_tap)
        weights = _take(_take(y.weights, y_tap), entry) * _take(x.weights, x_tap)
        yield _Pairs(rois[part], begins, table_rows, weights)
        begin = end


def _take(values: Tensor, at: Tensor) -> Tensor:
    """``values[at]`` of one axis; on a CPU several times as fast."""
    return values.index_select(0, at)
