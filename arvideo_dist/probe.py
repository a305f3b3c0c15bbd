"""Linear probes on stored features: `python -m arvideo_dist.probe TRAIN VAL [--test FEATURES]`.

TRAIN, VAL and FEATURES are what `embed` wrote, of labelled videos. A head is trained for each pair of learning rate
and weight decay, all at once; the best on VAL is chosen, and all of them are reported.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from arvideo_dist.config.settings import exit_with
from arvideo_dist.tasks.feature_files import VideoFeatures, read_features
from arvideo_dist.tasks.probing import at_the_edge, check_alike, grid, labelled, table, top1, train_probes

# AdamW's decay shrinks weights by rate x decay a step, so that small ones do nothing in a short training.
LEARNING_RATES, WEIGHT_DECAYS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.0, 0.1, 1.0, 10.0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m arvideo_dist.probe", description=__doc__)
    parser.add_argument(
        "train", metavar="TRAIN", help="features to learn from: file, or folder or URI of its run"
    )
    parser.add_argument("val", metavar="VAL", help="features by which the best head is chosen")
    parser.add_argument("--test", metavar="FEATURES", help="features that the choice has not seen")
    for name, values in (("learning-rates", LEARNING_RATES), ("weight-decays", WEIGHT_DECAYS)):
        shown = " ".join(f"{value:g}" for value in values)
        parser.add_argument(
            f"--{name}", nargs="+", type=float, default=values, metavar="X", help=f"({shown})"
        )
    parser.add_argument("--epochs", type=int, default=100, help="passes over the training videos (100)")
    parser.add_argument("--batch", type=int, default=256, help="videos of a step (256)")
    parser.add_argument("--seed", type=int, default=0, help="decides the order of the videos (0)")
    parser.add_argument("--out", metavar="FOLDER", default="build/probe", help="(build/probe)")
    flags = parser.parse_args(argv)
    try:
        _probe(flags)
    except ValueError as error:
        exit_with(error, 2)


def _probe(flags: argparse.Namespace) -> None:
    """Train, print the table and write the files. Raises ValueError."""
    least = min(*flags.learning_rates, *flags.weight_decays, flags.seed)
    if min(flags.epochs, flags.batch) < 1 or least < 0:
        raise ValueError("--epochs and --batch are at least 1; rates, decays and --seed at least 0")
    given = {"train": flags.train, "val": flags.val} | ({"test": flags.test} if flags.test else {})
    features = {name: read_features(address) for name, address in given.items()}
    for name, address in given.items():
        check_alike(features["train"], features[name], address)
    videos = {name: labelled(features[name], address) for name, address in given.items()}
    settings = grid(flags.learning_rates, flags.weight_decays)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probes, scaling = train_probes(
        videos["train"], settings, epochs=flags.epochs, batch=flags.batch, seed=flags.seed, device=device
    )
    shares = {name: top1(probes, scaling, each) for name, each in videos.items()}
    heads = [
        {**each._asdict(), **{f"top1_{name}": share[head] for name, share in shares.items()}}
        for head, each in enumerate(settings)
    ]
    best = max(range(len(heads)), key=lambda head: shares["val"][head])  # of equal ones the first
    print("\n".join([*table(heads, best), *at_the_edge(settings[best].learning_rate, flags.learning_rates)]))
    print("videos: " + ", ".join(f"{len(each.labels_n)} {name}" for name, each in videos.items()))
    result = {
        "best": best,
        "heads": heads,
        "videos": {name: len(each.labels_n) for name, each in videos.items()},
        **{name: getattr(flags, name) for name in ("epochs", "batch", "seed")},
        "classes": _names(features["train"]),
        "about": features["train"].about,
    }
    head = {"weight": probes.weights[best], "bias": probes.biases[best]}
    _write(Path(flags.out), result, head | {"mean": scaling.mean_d, "deviation": scaling.deviation_d})


def _write(out: Path, result: dict[str, Any], head: dict[str, torch.Tensor]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "probe.json").write_text(json.dumps(result, indent=1) + "\n")
    head = {name: value.detach().cpu().contiguous() for name, value in head.items()}
    save_file(head, out / "probe.safetensors")
    print(f"{out / 'probe.json'}\n{out / 'probe.safetensors'}")


def _names(features: VideoFeatures) -> dict[str, str | None]:
    """Of the classes, by label."""
    named = dict(zip(features.labels, features.label_names, strict=True))
    return {str(label): named[label] for label in sorted(label for label in named if label is not None)}


if __name__ == "__main__":
    main()
