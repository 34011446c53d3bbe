# SPDX-License-Identifier: Apache-2.0
"""Image models forget: one small network, many methods, attacks and figures.

    python -m experiments.vision.run --config experiments/vision/configs/fashion.py

`world` trains the network, `methods` makes it forget, `attacks` scores it, `figures`
and `claims` draw the page. experiments/condensation and experiments/multi_gan hold the
methods of two papers and use the same world.
"""
