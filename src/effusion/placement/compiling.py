"""The two things that the engine needs of the compiler, without importing it (which takes seconds)."""

from __future__ import annotations

import types
from typing import Any

from torch._C._dynamo import eval_frame as _frames

set_eval_frame: Any = _frames.set_eval_frame  # None: compile nothing that is called from here on; returns what was set


def skip_code(code: types.CodeType) -> None:
    """Never compile a frame of ``code``; what it calls may be compiled."""
    if hasattr(_frames, "set_code_exec_strategy"):
        action = _frames._FrameAction
        _frames.set_code_exec_strategy(code, _frames._FrameExecStrategy(action.SKIP, action.DEFAULT))
    else:
        _frames.skip_code(code)  # type: ignore[attr-defined]
