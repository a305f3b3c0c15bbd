"""The features of one video file, made as those of a data set were.

Letters: V views, T frames, S pixels of a side, D width.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from arvideo_dist.config.commands import EmbedConfig
from arvideo_dist.data.decode import BadSample, decode_rgb
from arvideo_dist.data.index import DatasetManifest
from arvideo_dist.data.views import Views, spatial_views, temporal_views
from arvideo_dist.storage import shown
from arvideo_dist.tasks.embedding import Embedding
from arvideo_dist.train.trained import READERS
from data_prep.errors import Interrupted, Rejected
from data_prep.isolation import Limits, Prober
from data_prep.transcode import TranscodeSettings, transcode


class QueryVideo:
    """A file as data_prep would have it in the data set: its bytes and its number of frames."""

    def __init__(self, path: Path, about: dict[str, Any], manifest: DatasetManifest) -> None:
        """`about`: of the features. ValueError if data_prep would refuse the file."""
        self._about, self._path = about, path
        try:  # a data set that another program made has no such settings
            settings = TranscodeSettings.model_validate(manifest.settings.get("transcode"))
        except ValidationError:
            settings = TranscodeSettings()
        limits = Limits()
        prober = Prober(limits)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                target = Path(scratch) / "query.mp4"
                info, _ = transcode(path.resolve(), target, settings, limits, prober)
                self._video, self._frames = target.read_bytes(), info.frames
        except (Rejected, Interrupted) as error:
            raise ValueError(f"{path} cannot be used as query: {error}") from error
        finally:
            prober.close()

    def clips(self, views: Views, size: int) -> torch.Tensor:
        """uint8 [V, 3, T, size, size]. Raises ValueError if it cannot be decoded."""
        data, frames = self._about["data"], self._about["model"]["frames"]
        windows = temporal_views(self._frames, frames, data["stride"], data["sampling"], views.temporal)
        wanted = np.unique(windows)
        try:
            pictures = decode_rgb(self._video, wanted)
        except BadSample as error:
            raise ValueError(f"{self._path} cannot be used as query: {error}") from error
        of_windows = ([pictures[i] for i in np.searchsorted(wanted, window)] for window in windows)
        return torch.cat([spatial_views(each, size, views.spatial) for each in of_windows])

    def features(self, source: str | None) -> NDArray[np.float32]:
        """The mean [D] over all views and tokens. `source`: the encoder, if not where it was. Raises ValueError."""
        task = Embedding(_config(self._about, source))
        module = task.build()
        try:
            task.load(module, READERS)
        except ValueError as error:
            raise ValueError(
                f"the encoder that made the features cannot be read: {shown(error)}. Give --source, where it is now"
            ) from error
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        clips = self.clips(task.views, task.config.model.image_size)
        with torch.inference_mode():
            tokens_vld = module.to(device).eval()(clips.to(device))
        mean_d: NDArray[np.float32] = tokens_vld.mean(dim=(0, 1)).cpu().numpy()
        return mean_d


def _config(about: dict[str, Any], source: str | None) -> EmbedConfig:
    """As the features were made, but that their mean over the tokens is wanted."""
    data = {name: about["data"][name] for name in ("path", "split", "sampling", "stride")}
    if data["sampling"] == "segments":
        del data["stride"]
    return EmbedConfig.model_validate(
        {
            "model": {**about["model"], "init_from": source or about["source"]},
            "embedding": {"views": about["views"], "pooling": "mean"},
            "data": data,
        }
    )
