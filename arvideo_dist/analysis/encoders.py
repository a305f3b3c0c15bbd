"""Encoders from whatever holds one: runs, checkpoints, folders of `transformers`, exported files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from arvideo_dist.config.data import TrainDataConfig
from arvideo_dist.config.section import Triple
from arvideo_dist.model.interchange import is_weights_file, read_encoder
from arvideo_dist.model.layouts import load_encoder
from arvideo_dist.model.vit import ENCODER_SIZES, Encoder
from arvideo_dist.storage import Storage
from arvideo_dist.train.trained import open_trained


@dataclass(frozen=True)
class OpenedEncoder:
    label: str  # for a plot's legend
    source: str
    encoder: Encoder
    clip: tuple[int, int]  # frames, image size
    tubelet: Triple
    run: Storage | None = None  # of a checkpoint
    data: TrainDataConfig | None = None

    @property
    def tokens(self) -> int:
        (frames, size), (p_t, p_h, p_w) = self.clip, self.tubelet
        return frames // p_t * (size // p_h) * (size // p_w)


def open_encoders(sources: Sequence[str]) -> list[OpenedEncoder]:
    """The encoders of `sources`, which must take the same clips and cut them into as many tokens.

    A source is a run's folder or one of its checkpoints (as for `export`), a folder of `transformers`, or a
    file of weights in one of the layouts that `model.init_from` takes. Such a file does not say what clips it
    is for; it takes those of the other sources. Raises ValueError.
    """
    opened = {source: _open(source) for source in sources if not is_weights_file(source)}
    clips = {encoder.clip for encoder in opened.values()}
    if len(clips) > 1:
        raise ValueError(f"the encoders take other clips: {_listed(opened, 'clip')} (frames, pixels)")
    for source in sources:
        if source not in opened:
            if not clips:
                raise ValueError(
                    f"{source} does not say how many frames and pixels its clips have: compare it with a run, "
                    "a checkpoint or a folder of transformers"
                )
            [clip] = clips
            opened[source] = _from_weights(source, clip)
    if len({encoder.tokens for encoder in opened.values()}) > 1:
        raise ValueError(
            f"the encoders cut a clip into other numbers of tokens: {_listed(opened, 'tokens')}; ranks of "
            "attention maps of other sizes do not compare"
        )
    labels = [encoder.label for encoder in opened.values()]
    return [
        replace(encoder, label=source) if labels.count(encoder.label) > 1 else encoder
        for source, encoder in ((source, opened[source]) for source in dict.fromkeys(sources))
    ]


def _listed(opened: dict[str, OpenedEncoder], attribute: str) -> str:
    return ", ".join(f"{source} {getattr(encoder, attribute)}" for source, encoder in opened.items())


def _open(source: str) -> OpenedEncoder:
    folder = Storage(source)
    if folder.exists("config.json"):
        return _from_transformers(source, json.loads(folder.read_bytes("config.json")))
    trained = open_trained(source)
    model = trained.config.model
    return OpenedEncoder(
        trained.label,
        source,
        trained.load_encoder(),
        (model.frames, model.image_size),
        model.tubelet,
        trained.run,
        trained.config.data,
    )


def _from_transformers(source: str, config: dict[str, object]) -> OpenedEncoder:
    if config.get("model_type") != "videomae":
        raise ValueError(f"{source} holds a model of type {config.get('model_type')}, not videomae")
    frames, size = config["num_frames"], config["image_size"]
    if not isinstance(frames, int) or not isinstance(size, int):
        raise ValueError(f"{source}: num_frames {frames}, image_size {size}: only square clips are read")
    return _from_weights(source, (frames, size), config["num_attention_heads"])


def _from_weights(source: str, clip: tuple[int, int], heads: object = None) -> OpenedEncoder:
    try:
        weights = read_encoder(source)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    width, _, p_t, p_h, p_w = weights["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    sizes = {(size.width, size.depth): size for size in ENCODER_SIZES.values()}
    if (width, depth) not in sizes:
        raise ValueError(f"{source}: no encoder is {width} wide and {depth} deep; there are {sorted(sizes)}")
    size = sizes[width, depth]
    if heads not in (None, size.heads):
        raise ValueError(f"{source} has {heads} heads a layer; an encoder of its size has {size.heads} here")
    tokens = clip[0] // p_t * (clip[1] // p_h) * (clip[1] // p_w)
    encoder = Encoder(size, (p_t, p_h, p_w), tokens)
    load_encoder(encoder, weights)
    label = source.partition("?")[0].rstrip("/").rpartition("/")[2]
    return OpenedEncoder(label, source, encoder, clip, (p_t, p_h, p_w))
