# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10: all 20,000 images of its subset, the paper's CNN, three seeds.

    python -m experiments.vision.run --config experiments/vision/configs/cifar.py

Needs cifar10_subset/ in the folder that the variable JAXUNLEARN_DATA names. For the
binary files of the full CIFAR-10 add --set name=cifar10 --set train=5000 --set
test=1000. No image of it is drawn.
"""

from experiments.vision import world


def get_config():
    c = world.defaults()
    c.name = "cifar10_subset"
    c.train, c.test = 2000, 300
    c.width = 1.0
    c.epochs, c.tune_epochs, c.learning_rate = 5, 1, 1e-3
    c.rounds, c.threshold = 5, 4
    c.forget_class = 2
    c.pictures = False
    return c
