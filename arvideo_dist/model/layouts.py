"""Names of the encoder's parameters in the ecosystem: the original VideoMAE repository and `transformers`.

Ours are the original repository's, below a prefix there (`encoder.` in its pretraining checkpoints). The
classes of `transformers` split qkv in three and use other names; releases before 5 keep the biases as
`attention.attention.q_bias` and `v_bias`, later ones read these and write `query.bias` and `value.bias`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

Weights = Mapping[str, torch.Tensor]

_EMBED = "embeddings.patch_embeddings.projection"
_FINAL_NORM = {"norm.weight", "norm.bias"}
# Ours to transformers', inside a block; qkv and its biases are apart.
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_ATTENTION = "attention.attention"


def to_transformers(encoder: Weights) -> dict[str, torch.Tensor]:
    """The state of `vit.Encoder` as `VideoMAEModel` names it, without a prefix, final norm included."""
    renamed = {}
    for name, value in encoder.items():
        module, _, kind = name.rpartition(".")
        if module == "patch_embed.proj":
            renamed[f"{_EMBED}.{kind}"] = value
        elif module == "norm":
            renamed[f"layernorm.{kind}"] = value
        else:
            _, number, inside = module.split(".", 2)
            block = f"encoder.layer.{number}"
            if inside == "attn.qkv":
                for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    renamed[f"{block}.{_ATTENTION}.{part}.weight"] = rows.clone()
            elif inside == "attn":
                renamed[f"{block}.{_ATTENTION}.{kind}"] = value  # q_bias, v_bias
            else:
                renamed[f"{block}.{_IN_BLOCK[inside]}.{kind}"] = value
    return renamed


def to_encoder(weights: Weights) -> dict[str, torch.Tensor]:
    """The encoder's part of `weights`, in either layout, under our names.

    A classifier's weights have no final norm. Raises ValueError if no VideoMAE encoder is found, or one
    whose positions are learned.
    """
    for name in weights:
        for ending, convert in ((f"{_EMBED}.weight", _from_transformers), ("patch_embed.proj.weight", dict)):
            if name == ending or name.endswith(f".{ending}"):
                prefix = name.removesuffix(ending)
                own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
                if "pos_embed" in own:
                    raise ValueError(
                        "its positions are learned (pos_embed); this encoder's are fixed sinusoids"
                    )
                return {
                    k: v
                    for k, v in convert(own).items()
                    if k.split(".")[0] in ("patch_embed", "blocks", "norm")
                }
    raise ValueError(
        "it holds no VideoMAE encoder: neither patch_embed.proj.weight (original repository) nor "
        f"{_EMBED}.weight (transformers) is among its {len(weights)} tensors"
    )


def to_classifier(weights: Weights) -> dict[str, torch.Tensor]:
    """A classifier's weights in either layout, by the names of `model.classifier.Classifier`.

    Raises ValueError if there is no head.
    """
    found = {
        f"encoder.{name}": value for name, value in to_encoder(weights).items() if name not in _FINAL_NORM
    }
    for ours, theirs in (("fc_norm", ("fc_norm",)), ("head", ("classifier", "head"))):
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in theirs if f"{name}.{kind}" in weights]
            if not names:
                raise ValueError(f"it holds no classifier: there is no {theirs[0]}.{kind}")
            found[f"{ours}.{kind}"] = weights[names[0]]
    return found


def _from_transformers(weights: Weights) -> dict[str, torch.Tensor]:
    ours = {theirs: name for name, theirs in _IN_BLOCK.items()}
    renamed: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if module == _EMBED:
            renamed[f"patch_embed.proj.{kind}"] = value
        elif module == "layernorm":
            renamed[f"norm.{kind}"] = value
        elif match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module):
            block, inside = f"blocks.{match[1]}", match[2]
            if inside in ours:
                renamed[f"{block}.{ours[inside]}.{kind}"] = value
            elif inside == _ATTENTION:
                renamed[f"{block}.attn.{kind}"] = value
            elif (inside, kind) in ((f"{_ATTENTION}.query", "bias"), (f"{_ATTENTION}.value", "bias")):
                renamed[f"{block}.attn.{inside[len(_ATTENTION) + 1]}_bias"] = value
            elif inside == f"{_ATTENTION}.query":
                base = f"encoder.layer.{match[1]}.{_ATTENTION}"
                parts = [weights[f"{base}.{part}.weight"] for part in ("query", "key", "value")]
                renamed[f"{block}.attn.qkv.weight"] = torch.cat(parts)
    return renamed


def load_encoder(encoder: torch.nn.Module, weights: Weights) -> bool:
    """Copy `weights` (either layout) into `encoder`; False if they have no final norm: the encoder's own stays.

    An encoder without a final norm (a classifier's) leaves theirs out. Raises ValueError if they belong to an
    encoder of another size or geometry.
    """
    found = to_encoder(weights)
    own = encoder.state_dict()
    has_norm = found.keys() >= _FINAL_NORM
    if not own.keys() >= _FINAL_NORM:
        found = {name: value for name, value in found.items() if name not in _FINAL_NORM}
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    expected = {name: tuple(value.shape) for name, value in own.items()}
    differing = sorted(
        name
        for name in shapes.keys() | expected.keys()
        if shapes.get(name) != expected.get(name) and not (name in _FINAL_NORM and name not in shapes)
    )
    if differing:
        name = differing[0]
        raise ValueError(
            f"it holds another encoder than the configuration asks for: {len(differing)} parameters differ, "
            f"such as {name}, which is {shapes.get(name, 'missing')} there and {expected.get(name, 'missing')} "
            "here; set model.encoder and model.tubelet to those of the weights"
        )
    encoder.load_state_dict({**own, **found})
    return has_norm
