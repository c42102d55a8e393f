"""``effusion VERB …``: one file per verb; a verb imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from ..core.errors import EffusionError
from . import env, generate, inspect, plan, samplers
from .usage import UsageError

VERBS = (generate, plan, inspect, samplers, env)
USAGE, FAILURE, INTERRUPTED = 2, 1, 130


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    top = argparse.ArgumentParser(
        prog="effusion",
        description="Run diffusion models in little memory.",
        epilog="Exit status: 0 done, 1 it failed, 2 the arguments are wrong. EFFUSION_DEBUG=1 shows tracebacks.",
    )
    top.add_argument("--version", action="version", version=f"effusion {__version__}")
    subparsers = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add_parser(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. What a user can do wrong is one line on stderr."""
    arguments = parser().parse_args(argv)
    verb = {v.__name__.rpartition(".")[2]: v for v in VERBS}[arguments.verb]
    try:
        verb.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:  # `effusion inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UsageError as error:
        return _say(f"{error}", USAGE)
    except (EffusionError, ValueError, OSError, MemoryError) as error:
        return _say(str(error) or type(error).__name__, FAILURE)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's own, which is not imported for its name
            raise
        return _say(str(error), FAILURE)
    return 0


def _say(message: str, status: int) -> int:
    """One line on stderr, whatever ``message`` was; the traceback too, if asked for."""
    if os.environ.get("EFFUSION_DEBUG") and sys.exc_info()[0] not in (None, KeyboardInterrupt):
        traceback.print_exc()
    print(f"effusion: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
