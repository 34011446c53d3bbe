# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST: 1000 images, the paper's CNN, three seeds.

    python -m experiments.vision.run --config experiments/vision/configs/fashion.py

Needs fashion_mnist/ in the folder that the variable JAXUNLEARN_DATA names. Expect what
experiments/vision/README.md reports.
"""

from experiments.vision import world


def get_config():
    c = world.defaults()
    c.width, c.gan_steps = 1.0, 1000
    return c
