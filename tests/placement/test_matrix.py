"""The matrix: every memory technique with every other gives the same bits; see :mod:`.matrix`."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from . import matrix

EVERY = Counter(itertools.product(matrix.POLICIES, matrix.STEPS))
_seen: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = matrix.save_all(tmp_path_factory.mktemp("pipelines"))
    gc.collect()
    gc.freeze()  # garbage is collected after every form: not among half a million objects of libraries
    yield folder
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _summary(pytestconfig: pytest.Config) -> Iterator[None]:
    """Prints the counts of this process after its last form."""
    yield
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and _seen:
        reporter.write_line(f"\n{matrix.counts(_seen, 'cpu')}\n")


@pytest.mark.parametrize("form", matrix.FORMS, ids=str)
def test_every_policy_gives_the_same_bits(form: matrix.Form, saved: Path, tmp_path: Path) -> None:
    looks = Counter(matrix.check(form, saved, tmp_path))
    assert looks == EVERY, "a cell was left out, or looked at twice"
    _seen.update(looks)


@pytest.mark.gpu
def test_the_same_matrix_on_a_gpu(saved: Path, tmp_path: Path) -> None:
    for form in matrix.FORMS:
        assert Counter(matrix.check(form, saved, tmp_path, "cuda")) == EVERY


@pytest.mark.parametrize("name", matrix.tiny.MAKERS)
def test_forms_differ_from_one_another(name: str, saved: Path) -> None:
    """The matrix would prove nothing if switches did nothing."""
    changes = [{}, {"cast": True}, {"tiling": True}, {"patched": True}]
    forms = [matrix.FORMS[0]._replace(pipeline=name, **change) for change in changes]
    pictures = [matrix.paint(form, matrix.prepare(form, saved, "cpu")) for form in forms]
    for a, b in itertools.combinations(range(len(forms)), 2):
        assert not torch.equal(pictures[a], pictures[b]), (forms[a], forms[b])
    sliced = forms[0]._replace(slicing=True)
    torch.testing.assert_close(matrix.paint(sliced, matrix.prepare(sliced, saved, "cpu")), pictures[0])
