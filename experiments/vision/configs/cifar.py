# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10: all 20,000 images of its subset, the paper's CNN, three seeds.

python -m experiments.vision.compare --config=experiments/vision/configs/cifar.py

Needs cifar10_subset/ in the folder that the variable JAXUNLEARN_DATA names; for all of
CIFAR-10's binary files set --config.name=cifar10 --config.train=5000
--config.test=1000. No picture of it is drawn.
"""

from experiments.vision import world


def get_config():
    c = world.defaults()
    c.name = "cifar10_subset"
    c.train, c.test = 2000, 300
    c.width = 1.0
    c.epochs, c.tune, c.learning_rate = 5, 1, 1e-3
    c.rounds, c.threshold = 5, 4
    c.forget_class = 2
    c.pictures = False
    return c
