# SPDX-License-Identifier: Apache-2.0
"""Models: networks as pure functions over a nested dict of arrays.

| name | gives |
| --- | --- |
| `make` | the decoder that a `DecoderConfig` describes |
| `resized` | the decoder for params whose MLPs have fewer units |
| `from_nnx` | a Model and its params, from a flax.nnx module |
| `to_nnx` | that module again, with other params |
| `from_linen` | a Model and its params, from a flax.linen module |
| `nnx_view` | an NNX module that holds a Model's params |
| `vision.make` | an image classifier: CNN, MLP, VGG-16, ResNet-18, ViT |
| `gan.make` | a generator and a discriminator of images |

`jaxunlearn.io.hf` loads and saves Hugging Face checkpoints. Nothing here needs more
than the core dependencies.
"""

from jaxunlearn.models import gan as gan
from jaxunlearn.models import vision as vision
from jaxunlearn.models._config import DecoderConfig, ExpertsConfig, RopeConfig
from jaxunlearn.models._flax import from_linen, from_nnx, nnx_view, to_nnx
from jaxunlearn.models.decoder import make, resized

__all__ = [
    "DecoderConfig",
    "ExpertsConfig",
    "RopeConfig",
    "from_linen",
    "from_nnx",
    "gan",
    "make",
    "nnx_view",
    "resized",
    "to_nnx",
    "vision",
]
