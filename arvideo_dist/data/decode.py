"""From the bytes of one video file to the wanted frames."""

from __future__ import annotations

import io

import decord
import numpy as np
from numpy.typing import NDArray


class BadSample(Exception):  # noqa: N818  # a finding about the data, not a fault of the program
    """One sample cannot be used; the message is the reason that the bad-sample record shows."""


def decode_frames(video: bytes, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Frames `indices` of the file `video` as RGB uint8 [T, H, W, 3]. Raises BadSample."""
    try:
        reader = decord.VideoReader(io.BytesIO(video), ctx=decord.cpu(0), num_threads=1)
        if int(indices.max()) >= len(reader):
            raise BadSample(f"frame {indices.max()} was asked for, the file has {len(reader)}")
        frames = reader.get_batch(indices).asnumpy()
        # While the reader lives its threads go on decoding ahead, and compete with the next sample.
        del reader
    except BadSample:
        raise
    except Exception as error:  # decord raises many types, RuntimeError and its own among them
        reason = str(error).strip().splitlines()
        raise BadSample(f"decode: {type(error).__name__}: {reason[0] if reason else ''}") from error
    return frames
