"""Arithmetic and parameters of a configuration, in closed form.

A multiply-add counts as two operations; only matrix products count, as in torch's FlopCounterMode with the
math attention kernel (masked halves of attention included: the kernels compute them).
"""

from __future__ import annotations

import math

import torch

from arvideo_dist.config.model import DecoderConfig, EncoderConfig, ModelConfig
from arvideo_dist.model.kinds import build_model, make_sequences
from arvideo_dist.model.vit import ENCODER_SIZES


def forward_backward_flops(model: ModelConfig, decoder: DecoderConfig) -> int:
    """FLOP of one clip's training step, forward and backward."""
    sequences, size = make_sequences(model, decoder), ENCODER_SIZES[model.encoder]
    n, m, d, w = sequences.encoder_tokens, sequences.decoder_queries, size.width, decoder.width
    cube = 3 * math.prod(model.tubelet)
    embed = 2 * n * cube * d
    encoder = size.depth * (2 * n * 12 * d * d + 4 * n * n * d)
    if model.kind == "videomae":  # every block sees visible and masked tokens
        per_block = 2 * (n + m) * 12 * w * w + 4 * (n + m) ** 2 * w
    else:
        per_block = _cross_attention_block_flops(n, m, w, decoder.self_attention)
    maps, skip = 1, 0  # feature maps that the decoder attends to, and what it costs to mix them
    if model.kind == "randsac":
        maps = decoder.depth
        skip = 2 * maps * size.depth * n * d
    decode = skip + 2 * maps * n * d * w + decoder.depth * per_block + 2 * m * w * cube
    # Backward costs twice the forward, except that pixels need no gradient.
    return 3 * (embed + encoder + decode) - embed


def _cross_attention_block_flops(n: int, m: int, w: int, self_attention: bool) -> int:
    """Forward, of one ARVideo decoder block: `m` queries over `n` tokens, width `w`."""
    flops = 2 * m * w * w * 2 + 2 * n * w * 2 * w + 4 * m * n * w + 2 * m * 8 * w * w
    return flops + (8 * m * w * w + 4 * m * m * w if self_attention else 0)


def classifier_flops(model: EncoderConfig, classes: int) -> int:
    """FLOP of one clip's step of fine-tuning, forward and backward: the encoder over all tokens and the head."""
    n, (d, depth, _) = math.prod(model.token_grid), ENCODER_SIZES[model.encoder]
    embed = embedding_flops(model)
    encoder = depth * (2 * n * 12 * d * d + 4 * n * n * d)
    return 3 * (embed + encoder + 2 * d * classes) - embed


def classifier_forward_flops(model: EncoderConfig, classes: int) -> int:
    """Forward, of one clip; without `classes` (0) the encoder alone."""
    return (classifier_flops(model, classes) + embedding_flops(model)) // 3


def embedding_flops(model: EncoderConfig) -> int:
    """Forward, of embedding all tokens of a clip."""
    width = ENCODER_SIZES[model.encoder].width
    return 2 * math.prod(model.token_grid) * 3 * math.prod(model.tubelet) * width


def parameter_count(model: ModelConfig, decoder: DecoderConfig) -> int:
    """Trained parameters, encoder and decoder."""
    return sum(math.prod(shape) for shape in parameter_shapes(model, decoder).values())


def parameter_shapes(model: ModelConfig, decoder: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Each parameter's shape, by name."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build_model(model, decoder).named_parameters()}
