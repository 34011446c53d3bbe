# SPDX-License-Identifier: Apache-2.0
"""Networks as Models: pure functions over a nested dict of arrays.

| name | gives |
| --- | --- |
| `make` | the decoder that a `DecoderConfig` describes |
| `resized` | the decoder for params with fewer units in their MLPs |
| `from_nnx` | a Model, and its params, from a flax.nnx module |
| `from_linen` | a Model, and its params, from a flax.linen module |
| `nnx_view` | an NNX module that holds a Model's params |
| `gan.make` | a generator and a discriminator of images |
| `vision.make` | an image classifier: CNN, MLP, VGG-16, ResNet-18, ViT |

Checkpoints in Hugging Face's format come in through `jaxunlearn.io.hf`.
"""

from jaxunlearn.models import gan as gan
from jaxunlearn.models import vision as vision
from jaxunlearn.models._config import DecoderConfig, RopeConfig
from jaxunlearn.models._flax import from_linen, from_nnx, nnx_view
from jaxunlearn.models.decoder import make, resized

__all__ = [
    "DecoderConfig",
    "RopeConfig",
    "from_linen",
    "from_nnx",
    "gan",
    "make",
    "nnx_view",
    "resized",
    "vision",
]
