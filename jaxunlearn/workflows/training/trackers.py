# SPDX-License-Identifier: Apache-2.0
"""Hooks that write a run's metrics: JSON lines, TensorBoard, Weights & Biases, a line
on the screen."""

import zlib
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxunlearn import _checks
from jaxunlearn._fit import Hook
from jaxunlearn.io import log


def hooks(config: ConfigDict, output: Path, done: int) -> list[Hook]:
    """Hooks for fit that write every step once; only the first process writes.

    Args:
        config: its `log` lists them.
        output: folder for metrics.jsonl and tensorboard/.
        done: steps that were done before. Entries of later steps, from a run that was
            killed, are removed.
    Raises:
        ImportError: if a package that the config needs is not installed.
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


def lines(steps: int, every: int, log_fn: Callable[[str], None]) -> Hook:
    """A hook that gives `log_fn` a line of losses every few steps and at the end."""

    def call(state, entry):
        del state
        done = entry["step"] + 1
        if done % every == 0 or done == steps:
            losses = ", ".join(
                f"{name} {value:.4g}"
                for name, value in entry.items()
                if name.endswith("/loss")
            )
            log_fn(f"step {done}/{steps}: {losses} ({entry['seconds']:.2f} s)")

    call.reads_state = False
    return call


def _tensorboard(folder: Path, done: int) -> Hook:
    library = _library("log.tensorboard", "tensorboardX")
    writer = library.SummaryWriter(str(folder), purge_step=done)

    def call(state, entry):
        del state
        for name, value in entry.items():
            if name != "step":
                writer.add_scalar(name, value, entry["step"])
        writer.flush()

    call.reads_state = False
    return call


def _wandb(config: ConfigDict, output: Path) -> Hook:
    # The same name after a restart.
    name = f"{zlib.crc32(str(output.absolute()).encode()):08x}"
    run = _library("log.wandb", "wandb").init(
        project=config.log.project,
        id=name,
        resume="allow",
        dir=str(output),
        config=config.to_dict(),
    )

    def call(state, entry):
        del state
        run.log({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])

    call.reads_state = False
    return call


def _library(setting: str, name: str):
    owner = f"The setting {setting}"
    return _checks.library(owner, name, "trackers", f", or set {setting}=False")
