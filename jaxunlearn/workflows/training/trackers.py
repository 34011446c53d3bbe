# SPDX-License-Identifier: Apache-2.0
"""Where a run's metrics go: JSON lines always, TensorBoard and Weights & Biases if
asked."""

import importlib
import zlib
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxunlearn._fit import Hook
from jaxunlearn.io import log


def hooks(config: ConfigDict, output: Path, done: int) -> list[Hook]:
    """Hooks for fit that write every step once; only the first process writes.

    Args:
        config: its `log` says what is wanted.
        output: folder for metrics.jsonl and tensorboard/.
        done: steps that were done before; what was logged beyond them is taken back.
    Raises:
        ImportError: if a package that is asked for is not installed.
    """
    if jax.process_index() != 0:
        return []
    file = output / "metrics.jsonl"
    log.keep_before(file, done)
    found: list[Hook] = [log.JsonLines(file, append=done > 0)]
    if config.log.tensorboard:
        found.append(_tensorboard(output / "tensorboard", done))
    if config.log.wandb:
        found.append(_wandb(config, output))
    return found


def _tensorboard(folder: Path, done: int) -> Hook:
    tensorboard = _module("tensorboardX", "log.tensorboard=False")
    writer = tensorboard.SummaryWriter(str(folder), purge_step=done)

    def call(state, entry):
        del state
        for name, value in entry.items():
            if name != "step":
                writer.add_scalar(name, value, entry["step"])
        writer.flush()

    return call


def _wandb(config: ConfigDict, output: Path) -> Hook:
    wandb = _module("wandb", "log.wandb=False")
    name = f"{zlib.crc32(str(output.absolute()).encode()):08x}"  # the same on restart
    run = wandb.init(
        project=config.log.project,
        id=name,
        resume="allow",
        dir=str(output),
        config=config.to_dict(),
    )

    def call(state, entry):
        del state
        run.log({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])

    return call


def _module(name: str, off: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"The config's log needs the package {name}, which is not installed. Run "
            f"pip install {name}, or set --config.{off}"
        ) from error
