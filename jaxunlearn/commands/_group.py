# SPDX-License-Identifier: Apache-2.0
"""The group of all commands, and the one place where errors become a line.

A command is a module of this folder that is listed in COMMANDS. It has

    @_group.command("What it does, in one line.")
    @click.argument("run")
    @click.option("--batch-size", default=32, show_default=True, help="Rows at a time.")
    def command(run, batch_size):
        from jaxunlearn.workflows import run_folder  # heavy imports go inside

        folder, record = run_folder.finished(run)
        ...

It raises ordinary errors (ValueError, OSError, ...), prints results to standard output
and progress to standard error (click.echo(..., err=True)), and never calls sys.exit.
`--debug`, `--no-compilation-cache` and `--help` come with the decorator.
"""

import _thread
import difflib
import functools
import importlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import click

COMMANDS = ("forget", "finetune", "evaluate", "attack", "report", "export", "plan")
STOPPED, INTERRUPTED = 75, 130
DELAY = 0.1  # seconds until a signal that was dropped is sent again
RESUME = "What was finished is saved. Run the same command again to resume."


class Terminated(BaseException):
    """SIGTERM arrived."""


def terminate(number: int, frame: Any) -> NoReturn:
    """A handler of SIGTERM."""
    raise Terminated


def send_again(unraisable: Any) -> None:
    """A sys.unraisablehook that sends a signal again if Python dropped its exception.

    Python drops an exception that is raised inside a callback of the garbage collector
    (JAX has one) or inside __del__, so a Ctrl-C that arrives there would be lost.
    """
    match unraisable.exc_value:
        case KeyboardInterrupt():
            number = signal.SIGINT
        case Terminated():
            number = signal.SIGTERM
        case _:
            return sys.__unraisablehook__(unraisable)
    # Not at once: an exception that is raised inside this hook is dropped too.
    timer = threading.Timer(DELAY, _thread.interrupt_main, [number])
    timer.daemon = True
    timer.start()


class Group(click.Group):
    """Loads a command's module when it is used, and turns errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"jaxunlearn.commands.{name}").command

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {_all()}."
            raise click.UsageError(f"There is no command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)

    def main(self, args=None, prog_name=None, standalone_mode=True, **extra) -> Any:
        """Runs the command line and exits with a status that `commands` documents."""
        debug: list[bool] = []
        try:
            status = super().main(
                args, prog_name, standalone_mode=False, obj=debug, **extra
            )
            raise SystemExit(status if isinstance(status, int) else 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            raise SystemExit(0) from None
        except (Exception, KeyboardInterrupt, Terminated) as error:
            if debug:
                traceback.print_exception(error)
            message, status = _explained(error)
            click.echo(message, err=True)
            raise SystemExit(status) from None


def _explained(error: BaseException) -> tuple[str, int]:
    """(the line, the exit status) of an error."""
    match error:
        case KeyboardInterrupt() | click.Abort():
            return f"Interrupted. {RESUME}", INTERRUPTED
        case Terminated():
            return f"Stopped by SIGTERM. {RESUME}", STOPPED
        case click.ClickException():
            return f"error: {_joined(error.format_message())}", 2
    from jaxunlearn import NotFinite, _checks
    from jaxunlearn.data import source
    from jaxunlearn.io import checkpoint, preempt

    if isinstance(error, preempt.Stopped):
        return str(error), error.status
    refused = (
        _checks.Missing,
        ValueError,
        TypeError,
        OSError,
        ImportError,
        NotImplementedError,
    )
    failed = (NotFinite, checkpoint.NotSaved, source.BadRow)
    text = _joined(str(error)) or type(error).__name__
    if isinstance(error, failed):
        return f"error: {text}", 1
    if isinstance(error, ModuleNotFoundError) and "pip install" not in text:
        text += ". Run: pip install 'jaxunlearn[hf]'"
    if isinstance(error, refused):
        return f"error: {text}", 2
    hint = "Run the command again with --debug for the traceback."
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        hint = "Take a smaller --batch-size or --length, or more devices (--mesh)."
    return f"error: {type(error).__name__}: {text.rstrip('.')}. {hint}", 1


def _joined(text: str) -> str:
    """The text in one line."""
    return " ".join(text.split())


def _all() -> str:
    return ", ".join(COMMANDS)


def command(summary: str, epilog: str = "") -> Callable[[Callable], click.Command]:
    """Makes a function a command of the group, with the options of every command."""

    def decorate(function: Callable) -> click.Command:
        @functools.wraps(function)
        def run(*args, no_compilation_cache, **kwargs):
            from jaxunlearn.io import compilation_cache as cache

            (cache.disable if no_compilation_cache else cache.enable)()
            return function(*args, **kwargs)

        compilation = click.option(
            "--no-compilation-cache",
            is_flag=True,
            help="Keep no compiled programs in the user's cache folder.",
        )
        debug = click.option(
            "--debug",
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_set_debug,
            help="Show the traceback of an error.",
        )
        name = function.__module__.rpartition(".")[2]
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 88}
        return click.command(
            name, help=summary, epilog=epilog or None, context_settings=settings
        )(compilation(debug(run)))

    return decorate


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().obj.append(True)


@click.group(
    cls=Group,
    help="Machine unlearning: forget, then check whether the forgetting is real.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
    epilog="Exit status: 0 finished, 1 the run failed, 2 the command cannot be run, "
    "75 stopped by SIGTERM, 130 stopped by Ctrl-C. A stopped command resumes when it "
    "is run again.",
)
@click.version_option(package_name="jaxunlearn", message="%(prog)s %(version)s")
def group() -> None:
    pass
