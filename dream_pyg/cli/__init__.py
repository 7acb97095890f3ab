"""The command line: every command parses, calls one library function and prints."""

from __future__ import annotations

import errno
import logging
import sys
import time
from typing import IO, Any

import click
import torch

from dream_pyg import ranks
from dream_pyg.cli.bench import bench
from dream_pyg.cli.demo import demo
from dream_pyg.cli.figure import figure
from dream_pyg.cli.graph import build_graph
from dream_pyg.cli.inspect import inspect, models
from dream_pyg.cli.reproduce import reproduce
from dream_pyg.cli.serve import export, recommend
from dream_pyg.cli.train import evaluate, train
from dream_pyg.cli.tune import tune
from dream_pyg.cli.update import update_graph
from dream_pyg.data.signals import termination_as_interrupt
from dream_pyg.errors import ConfigError, DreamPygError, Interrupted

_SHARED = ("build-graph", "update-graph", "train")
_SECONDS_TO_SPEAK = 2.0


class _Failure(click.ClickException):
    """One ``Error:`` line on standard error and exit code 1; no traceback."""

    def show(self, file: IO[Any] | None = None) -> None:
        if not ranks.tells_failure():
            # torchrun ends all processes as soon as one has failed: let the other say why first.
            time.sleep(_SECONDS_TO_SPEAK)
            return
        click.echo(f"Error: {' '.join(self.message.split())}", file=file, err=True)


class _Misuse(_Failure):
    exit_code = 2


class _Interruption(_Failure):
    exit_code = 130


class _Commands(click.Group):
    """Turns every error that the library names into an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with termination_as_interrupt():
                return super().invoke(ctx)
        except Interrupted as error:
            raise _Interruption(str(error)) from error
        except KeyboardInterrupt as error:
            raise _Interruption("Interrupted; what was written before is whole.") from error
        except ConfigError as error:
            raise _Misuse(str(error)) from error
        except DreamPygError as error:
            raise _Failure(str(error)) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise _Failure(f"Out of memory: {error}") from error
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # the words of PyTorch's allocator, which has no type
                raise
            raise _Failure(f"Out of memory: {error}") from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output left: click ends quietly
                raise
            raise _Failure(f"The system refused: {error}. Check the path and its permissions.") from error


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExample:\n  dream-pyg demo",
)
@click.version_option(package_name="dream-pyg")
@click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
@click.pass_context
def main(ctx: click.Context, quiet: bool) -> None:
    """Multimodal recommendation with DREAM and its peers: build a graph once, train, evaluate, recommend.

    Results go to standard output, progress to standard error. Exit codes: 0 done, 1 failure, 2 wrong usage or
    configuration, 130 interrupted with the state saved.
    """
    logger = logging.getLogger("dream_pyg")
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.setLevel((logging.WARNING if quiet else logging.INFO) if ranks.speaks() else logging.CRITICAL)
    logger.propagate = False
    if ranks.num_launched() > 1 and ctx.invoked_subcommand not in _SHARED:
        raise ConfigError(
            f"`dream-pyg {ctx.invoked_subcommand}` works in one process. Start it without torchrun, which is for "
            f"{', '.join(_SHARED)}."
        )


for command in (
    build_graph,
    update_graph,
    train,
    evaluate,
    recommend,
    export,
    tune,
    reproduce,
    figure,
    inspect,
    models,
    demo,
    bench,
):
    main.add_command(command)
