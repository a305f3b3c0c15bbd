"""Encoder weights as files: folders that `transformers` loads, safetensors, the original repository's .pth.

Writing needs no `transformers`; reading never unpickles more than tensors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from arvideo_dist.config.model import EncoderConfig
from arvideo_dist.model.classifier import Classifier
from arvideo_dist.model.layouts import load_encoder, to_classifier, to_encoder, to_transformers
from arvideo_dist.model.pretraining import IMAGENET_MEAN, IMAGENET_STD
from arvideo_dist.model.vit import ENCODER_SIZES, NORM_EPS, Encoder
from arvideo_dist.storage import Storage, lasts, shown

Format = Literal["hf", "safetensors", "torch"]
WEIGHTS_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
_WEIGHTS_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")


def export_encoder(
    encoder: Encoder, model: EncoderConfig, to: Storage, format: Format, labels: int | None
) -> None:
    """Write `encoder` into the folder `to`.

    `hf`: model.safetensors, preprocessor_config.json and config.json (last: without it nothing loads); a
    VideoMAEModel, or with `labels` a VideoMAEForVideoClassification with a fresh head over that many classes.
    `safetensors`: encoder.safetensors under the original repository's names. `torch`: checkpoint.pth as that
    repository's pretraining writes it, for its fine-tuning script.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    if format == "safetensors":
        with to.writing("encoder.safetensors") as aside:
            save_file(weights, aside, metadata={"format": "pt"})
    elif format == "torch":
        with to.writing("checkpoint.pth") as aside:
            torch.save({"model": {f"encoder.{name}": value for name, value in weights.items()}}, aside)
    else:
        config = _transformers_config(model, labels)
        with to.writing("model.safetensors") as aside:
            save_file(_transformers_weights(weights, labels), aside, metadata={"format": "pt"})
        _write_json(to, "preprocessor_config.json", _preprocessor_config(model))
        _write_json(to, "config.json", config)


def export_classifier(
    classifier: Classifier, model: EncoderConfig, to: Storage, format: Format, class_names: Sequence[str]
) -> None:
    """Write a fine-tuned `classifier` into the folder `to`.

    `hf`: a VideoMAEForVideoClassification whose label map has `class_names`, as `export_encoder` writes it.
    `safetensors`: classifier.safetensors under the original repository's names. `torch`: checkpoint.pth as that
    repository's fine-tuning writes it.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in classifier.state_dict().items()}
    original = {name.removeprefix("encoder."): value for name, value in state.items()}
    if format == "safetensors":
        with to.writing("classifier.safetensors") as aside:
            save_file(original, aside, metadata={"format": "pt"})
        return
    if format == "torch":
        with to.writing("checkpoint.pth") as aside:
            torch.save({"model": original}, aside)
        return
    heads = ("fc_norm.", "head.")
    encoder = to_transformers({name: v for name, v in original.items() if not name.startswith(heads)})
    weights = {
        **{f"videomae.{name}": value for name, value in encoder.items()},
        **{name.replace("head.", "classifier."): v for name, v in original.items() if name.startswith(heads)},
    }
    config = _transformers_config(model, len(class_names))
    config["id2label"] = {str(label): name for label, name in enumerate(class_names)}
    config["label2id"] = {name: label for label, name in enumerate(class_names)}
    with to.writing("model.safetensors") as aside:
        save_file(weights, aside, metadata={"format": "pt"})
    _write_json(to, "preprocessor_config.json", _preprocessor_config(model))
    _write_json(to, "config.json", config)


def fill_encoder(encoder: Encoder, source: str | None, read: Callable[[str], dict[str, torch.Tensor]]) -> str:
    """Fill `encoder` from what `read` gives for `source` (None: it stays); returns what was taken, for the log.

    Raises ValueError naming model.init_from.
    """
    if source is None:
        return "random weights"
    try:
        has_norm = load_encoder(encoder, read(source))
    except ValueError as error:
        raise ValueError(f"model.init_from {shown(source)}: {shown(error)}") from error
    lack = "" if has_norm else " without a final norm, which these weights do not have"
    return f"{shown(source)} (encoder{lack})"


def read_encoder(source: str) -> dict[str, torch.Tensor]:
    """VideoMAE encoder weights at `source`, under our names.

    `source`: a folder of `transformers`, or a .safetensors, .pth, .pt or .bin file, local or in object
    storage. Raises ValueError if there is none, OSError if the store does not answer.
    """
    try:
        return to_encoder(_read(source))
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) and not lasts(error):
            raise  # a store that does not answer says nothing of the weights
        raise ValueError(str(error)) from error


def read_classifier_weights(source: str) -> dict[str, torch.Tensor]:
    """A classifier's weights at `source` (as for `read_encoder`) by the names of `model.classifier.Classifier`.

    Raises ValueError if there are none, OSError if the store does not answer.
    """
    try:
        weights = _read(source)
        return to_classifier(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) and not lasts(error):
            raise  # a store that does not answer says nothing of the weights
        raise ValueError(str(error)) from error


def is_weights_file(source: str) -> bool:
    """Whether `source` names a file of weights; an address in object storage may carry options after it."""
    path = source.partition("?")[0] if "://" in source else source
    return path.endswith(WEIGHTS_ENDINGS)


def _read(source: str) -> dict[str, torch.Tensor]:
    if is_weights_file(source):
        path, mark, options = source.partition("?") if "://" in source else (source, "", "")
        folder, _, name = path.rpartition("/")
        store, names = Storage(f"{folder or '.'}{mark}{options}"), [name]
    else:
        store = Storage(source)
        names = [member for member in _WEIGHTS_IN_FOLDER if store.exists(member)]
        if not names:
            raise ValueError(f"no such folder, or neither {' nor '.join(_WEIGHTS_IN_FOLDER)} is in it")
    if not store.exists(names[0]):
        raise ValueError("no such file")
    with tempfile.TemporaryDirectory() as scratch:
        local = store.local_copy(names[0], Path(scratch))
        if local.suffix == ".safetensors":
            return load_file(local)
        # The original repository's checkpoints also hold its argparse options, which are plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(local, map_location="cpu", weights_only=True)
    for key in ("model", "module"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def _transformers_weights(weights: dict[str, torch.Tensor], labels: int | None) -> dict[str, torch.Tensor]:
    renamed = to_transformers(weights)
    if labels is None:
        return renamed
    # A classifier has no norm after its encoder but one after pooling, fresh as in VideoMAE's fine-tuning.
    width = renamed.pop("layernorm.weight").numel()
    del renamed["layernorm.bias"]
    generator = torch.Generator().manual_seed(0)
    return {
        **{f"videomae.{name}": value for name, value in renamed.items()},
        "fc_norm.weight": torch.ones(width),
        "fc_norm.bias": torch.zeros(width),
        "classifier.weight": 0.02 * 0.001 * torch.randn(labels, width, generator=generator),
        "classifier.bias": torch.zeros(labels),
    }


def _transformers_config(model: EncoderConfig, labels: int | None) -> dict[str, Any]:
    size, (p_t, p_h, p_w) = ENCODER_SIZES[model.encoder], model.tubelet
    if p_h != p_w:
        raise ValueError(
            f"transformers' VideoMAE has square patches, this encoder's are {p_h} x {p_w}: use another --format"
        )
    config: dict[str, Any] = {
        "model_type": "videomae",
        "architectures": ["VideoMAEModel" if labels is None else "VideoMAEForVideoClassification"],
        "image_size": model.image_size,
        "patch_size": p_h,
        "num_channels": 3,
        "num_frames": model.frames,
        "tubelet_size": p_t,
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": NORM_EPS,
        "qkv_bias": True,
        "use_mean_pooling": labels is not None,  # False: VideoMAEModel has the final norm
        "dtype": "float32",
    }
    if labels is not None:
        config["id2label"] = {str(number): f"LABEL_{number}" for number in range(labels)}
        config["label2id"] = {f"LABEL_{number}": number for number in range(labels)}
    return config


def _preprocessor_config(model: EncoderConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": model.image_size},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": model.image_size, "width": model.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def _write_json(to: Storage, name: str, content: dict[str, Any]) -> None:
    to.write_bytes(name, (json.dumps(content, indent=2) + "\n").encode())
