"""`python -m data_prep stats OUT`: what is inside a split, in numbers and two pictures."""

from __future__ import annotations

import io
from collections import Counter

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from arvideo_dist.data.index import load_manifest
from arvideo_dist.storage import Storage
from data_prep.prepare import reject_kinds
from data_prep.shards import read_table

_SHEET_VIDEOS = 12
_SHEET_PICTURES = 6  # of each video, evenly over its length


def stats(storage: Storage, split: str) -> str:
    """The split's figures as text; writes `stats-<split>.png` and `contact-<split>.png` beside it."""
    manifest = load_manifest(storage, split)
    index = read_table(storage, manifest.index.name)
    rejects = read_table(storage, manifest.rejects_file.name)
    lines = [f"{storage.uri} split {split}: {manifest.samples} samples, {manifest.rejects} rejects"]
    if manifest.samples:
        columns = {
            "seconds a video": index["duration"],
            "pictures a video": index["frames"],
            "pictures a second": index["fps"],
            "width": index["width"],
            "height": index["height"],
            "KiB a video": pc.divide(index["size"].cast(pa.float64()), 1024.0),
            "KiB a second of video": pc.divide(
                pc.divide(index["size"].cast(pa.float64()), index["duration"]), 1024.0
            ),
        }
        lines.append(f"{'':24}{'min':>10}{'median':>10}{'mean':>10}{'max':>10}")
        for name, column in columns.items():
            values = column.to_numpy().astype(float)
            figures = (values.min(), np.median(values), values.mean(), values.max())
            lines.append(f"{name:24}" + "".join(f"{figure:10.1f}" for figure in figures))
        seconds, size = pc.sum(index["duration"]).as_py(), pc.sum(index["size"]).as_py()
        lines.append(
            f"in all {seconds / 3600:.2f} hours, {size / 2**20:.1f} MiB, {len(manifest.shards)} shards"
        )
    named = pc.value_counts(index["label_name"].drop_null())
    counts = Counter({each["values"].as_py(): each["counts"].as_py() for each in named})
    if counts:
        least, most = min(counts.values()), max(counts.values())
        lines.append(
            f"{len(counts)} of {len(manifest.labels)} labels occur, {least} to {most} videos each; most frequent: "
            + ", ".join(f"{name} ({count})" for name, count in counts.most_common(5))
        )
    lines += [f"rejected: {count} x {kind}" for kind, count in reject_kinds(rejects)]
    _save(storage, f"stats-{split}.png", _histograms(index, counts, rejects))
    lines.append(f"pictures: {storage.uri}/stats-{split}.png")
    if manifest.samples:
        _save(storage, f"contact-{split}.png", _contact_sheet(storage, index))
        lines.append(f"          {storage.uri}/contact-{split}.png")
    return "\n".join(lines)


def _rate(index: pa.Table) -> pa.ChunkedArray:
    """KiB a second of video."""
    return pc.divide(pc.divide(index["size"].cast(pa.float64()), index["duration"]), 1024.0)


def _save(storage: Storage, name: str, figure: Figure) -> None:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    storage.write_bytes(name, buffer.getvalue())


def _histograms(index: pa.Table, counts: Counter[str], rejects: pa.Table) -> Figure:
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for axis, values, name in (
        (axes[0], index["duration"], "seconds a video"),
        (axes[1], _rate(index), "KiB a second of video"),
        (axes[2], index["fps"], "pictures a second"),
    ):
        axis.hist(values.to_numpy(), bins=40)
        axis.set_xlabel(name)
        axis.set_ylabel("videos")
    axes[3].scatter(index["width"].to_numpy(), index["height"].to_numpy(), s=6)
    axes[3].set_xlabel("width")
    axes[3].set_ylabel("height")
    axes[4].bar(range(len(counts)), [count for _, count in counts.most_common()], width=1.0)
    axes[4].set_xlabel("labels by frequency")
    axes[4].set_ylabel("videos")
    kinds = reject_kinds(rejects)[:10]
    axes[5].barh([kind for kind, _ in kinds], [count for _, count in kinds])
    axes[5].set_xlabel("rejects")
    return figure


def _contact_sheet(storage: Storage, index: pa.Table) -> Figure:
    """Some videos, one a row, pictures from their beginning to their end."""
    places = np.unique(np.linspace(0, index.num_rows - 1, _SHEET_VIDEOS).astype(int))
    figure = Figure(figsize=(2 * _SHEET_PICTURES, 1.6 * len(places)), layout="constrained")
    axes = figure.subplots(len(places), _SHEET_PICTURES, squeeze=False)
    for row, place in zip(axes, places, strict=True):
        sample = index.slice(int(place), 1).to_pylist()[0]
        video = storage.read_range(sample["shard"], sample["offset"], sample["size"])
        wanted = np.linspace(0, sample["frames"] - 1, _SHEET_PICTURES).astype(int)
        with av.open(io.BytesIO(video), mode="r") as container:
            pictures = {
                number: frame.to_ndarray(format="rgb24")
                for number, frame in enumerate(container.decode(video=0))
                if number in wanted
            }
        for axis, number in zip(row, wanted, strict=True):
            axis.imshow(pictures[number])
            axis.axis("off")
        title = sample["label_name"] or sample["source"].rpartition("/")[2]
        row[0].set_title(title[:40], fontsize=8, loc="left")
    return figure
