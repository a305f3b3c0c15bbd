"""Memory that a training step keeps for its backward pass, in closed form.

Counted are distinct storages that autograd saves in fp32 with a memory-efficient attention kernel, which keeps
its inputs, its output and one number a row, never the attention matrix; parameters are left out. Of what a step
allocates besides, such as gradients, optimiser states and buffers of kernels, nothing is counted.

Letters: n encoder tokens, m decoder queries, d and w widths of encoder and decoder, p values of a cube.
"""

from __future__ import annotations

import math

from arvideo_dist.config.model import DecoderConfig, EncoderConfig, ModelConfig
from arvideo_dist.model.kinds import make_sequences
from arvideo_dist.model.vit import ENCODER_SIZES

_FP32 = 4  # bytes
_NORM = 2  # numbers a token that LayerNorm keeps: mean and inverse deviation


def activation_bytes_per_clip(model: ModelConfig, decoder: DecoderConfig) -> int:
    """Bytes saved for each clip of a micro batch."""
    sequences, size = make_sequences(model, decoder), ENCODER_SIZES[model.encoder]
    n, m, d, w = sequences.encoder_tokens, sequences.decoder_queries, size.width, decoder.width
    p, heads = 3 * math.prod(model.tubelet), decoder.width // decoder.head_width
    numbers = n * p + size.depth * n * _self_attention_block(d, size.heads)
    normed = n * (2 * d + _NORM)  # the last norm's input and output
    if model.kind == "videomae":
        numbers += normed + decoder.depth * (n + m) * _self_attention_block(w, heads)
        last_norm_input = (n + m) * w  # visible tokens too: the masked ones are a view of all
    else:
        maps = 1
        if model.kind == "randsac":
            maps = decoder.depth
            numbers += size.depth * n * d  # all layers' outputs, stacked to be mixed
        numbers += maps * (normed + n * w)  # norm's, and the context of the decoder's blocks
        numbers += decoder.depth * (m * (14 * w + 2 * _NORM + heads) + n * 2 * w)
        if decoder.self_attention:
            numbers += decoder.depth * m * (6 * w + _NORM + heads)
        last_norm_input = m * w
    numbers += last_norm_input + m * (_NORM + w) + m * p  # the norm, the head's input, the prediction's error
    return _FP32 * numbers


def _self_attention_block(width: int, heads: int) -> int:
    """Numbers a token of `vit.Block`: norm (in, out), qkv (3), attention (out), norm (in, out), MLP (4, 4)."""
    return 16 * width + 2 * _NORM + heads


def classifier_activation_bytes(model: EncoderConfig) -> int:
    """Bytes saved for each clip of fine-tuning; of what follows the mean over tokens nothing is counted."""
    size, n = ENCODER_SIZES[model.encoder], math.prod(model.token_grid)
    cubes = n * 3 * math.prod(model.tubelet)
    return _FP32 * (cubes + size.depth * n * _self_attention_block(size.width, size.heads))


def forward_activation_bytes(model: EncoderConfig) -> int:
    """Bytes that a forward pass over all tokens of a clip holds at a time, if nothing is kept for a backward pass:
    what a block takes, and what goes in and out of it."""
    return 2 * classifier_activation_bytes(model) // ENCODER_SIZES[model.encoder].depth


def activation_bytes_per_pass(model: ModelConfig, decoder: DecoderConfig) -> int:
    """Bytes saved besides, however many clips: each attention's mask as floating point, RandSAC's weights."""
    if model.kind == "videomae":
        return 0
    sequences, layers = make_sequences(model, decoder), ENCODER_SIZES[model.encoder].depth
    n, m = sequences.encoder_tokens, sequences.decoder_queries
    numbers = layers * n * n + decoder.depth * m * (n + (m if decoder.self_attention else 0))
    if model.kind == "randsac":
        numbers += decoder.depth * layers
    return _FP32 * numbers
