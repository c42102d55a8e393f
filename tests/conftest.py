"""For every test: one thread per worker, the sources importable in child processes too, no network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("EFFUSION_CACHE", tempfile.mkdtemp(prefix="effusion-tests-"))  # conversions of torch files
_source = str(Path(__file__).parents[1] / "src")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_source, os.environ.get("PYTHONPATH", "")]))

import pytest  # noqa: E402

from effusion.core import log  # noqa: E402

log.enable_propagation()  # to pytest's `caplog`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def _hub_session():  # type: ignore[no-untyped-def]
    from tests.hub_server import HubServer

    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def hub(_hub_session, tmp_path):  # type: ignore[no-untyped-def]
    """A hub on the loopback (see ``hub_server``) that ``huggingface_hub`` asks, with an empty cache."""
    _hub_session.repos.clear()
    _hub_session.requests.clear()
    _hub_session.faults.clear()
    with _hub_session.in_process(tmp_path / "hub-cache") as server:
        yield server
