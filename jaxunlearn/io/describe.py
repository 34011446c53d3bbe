# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, without reading its weights."""

import os

from jaxunlearn.io import hf
from jaxunlearn.models import decoder
from jaxunlearn.typing import Model


def model(
    path: str | os.PathLike, *, compute_dtype: str = "float32", remat: str = "full"
) -> Model:
    """The decoder of a checkpoint; arguments and errors as for `hf.load`."""
    return decoder.make(hf._open(path, compute_dtype, remat).config)
