"""The pretraining methods by their name in the configuration, `model.kind`."""

from __future__ import annotations

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.model.arvideo import ARVideo, make_clusters
from arvideo_dist.model.pretraining import PretrainingModel, Sequences
from arvideo_dist.model.randsac import RandSAC
from arvideo_dist.model.videomae import TubeMasking, VideoMAE

_MODELS: dict[str, type[ARVideo] | type[VideoMAE]] = {
    "arvideo": ARVideo,
    "videomae": VideoMAE,
    "randsac": RandSAC,
}


def build_model(model: ModelConfig, decoder: DecoderConfig) -> PretrainingModel:
    """The model that a configuration asks for, with fresh weights."""
    return _MODELS[model.kind](model, decoder)


def make_sequences(model: ModelConfig, decoder: DecoderConfig) -> Sequences:
    """What its encoder sees and its decoder predicts, without building it."""
    if model.kind == "videomae":
        return TubeMasking(model.token_grid, model.mask_ratio)
    return make_clusters(model, decoder)
