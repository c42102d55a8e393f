"""The errors that Effusion raises on purpose.

Each message says what came, what is allowed and what to do about it. Those that a user of the
ecosystem would catch under a builtin name (``OSError`` for a bad folder, ``ValueError`` for a bad
argument, ``ImportError`` for a missing package) inherit from that builtin too.
"""

from __future__ import annotations


class EffusionError(Exception):
    """Base class of every error that Effusion raises on purpose."""


class CheckpointError(EffusionError, OSError, ValueError):
    """A file or folder is not what it should be: which one, where in it, and what was expected."""


class MissingFile(CheckpointError):
    """A file that was looked for is not there."""


class HubSilent(MissingFile):
    """A file is not in the cache, and the hub could not be asked for it."""


class UntrustedCode(EffusionError, ValueError):
    """Loading would run foreign code (remote modules, pickles) and nobody consented to that."""


class MissingExtra(EffusionError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class BudgetError(EffusionError, ValueError):
    """No plan fits the memory budget; says the smallest that would and what relaxing gives."""


class PlanConflict(EffusionError, ValueError):
    """Memory techniques that can't be combined; says why and names the nearest legal plan."""


class UnsupportedTask(EffusionError, ValueError):
    """A family lacks the port that a task needs."""


class NotBuilt(EffusionError, NotImplementedError):
    """A part of the ecosystem that is not here yet; the message says what to use instead."""
