# SPDX-License-Identifier: Apache-2.0
"""Image models forget: methods, attacks and figures around one small network.

    python -m experiments.vision.compare --config=experiments/vision/configs/fashion.py

`world` trains the model, `methods` makes it forget, `attacks` judges, `figures` draws.
"""
