"""Memory that really runs out: however it is said, the work goes on with a leaner plan, to the same bits."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effusion.placement import arena
from effusion.placement.exhausted import is_out_of_memory

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("error", "says_so"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_it_is_said_in_many_ways(error: BaseException, says_so: bool) -> None:
    assert is_out_of_memory(error) == says_so


def test_pages_that_the_system_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError, match="no .* bytes"):
        arena.host_pages(1 << 60)


CHILD = """
import json, resource, sys, tempfile
from dataclasses import replace
from pathlib import Path
import torch
import effusion
from benchmarks import small
from effusion.placement.lane import lane_to
from effusion.placement.rescue import Rescue

way = sys.argv[1]

def limit(room):
    status = Path("/proc/self/status").read_text().splitlines()
    now = 1024 * int(next(x for x in status if x.startswith("VmSize")).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, (now + room if room else resource.RLIM_INFINITY, resource.RLIM_INFINITY))

lean = Rescue._lean

def others_end(self, *what):  # there is memory again, but what was under way has failed
    limit(None)
    lean(self, *what)

Rescue._lean = others_end

with tempfile.TemporaryDirectory() as folder:
    pipe = effusion.DiffusionPipeline.from_pretrained(small.save("Stable Diffusion", Path(folder), 16))
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 192, "width": 192, "num_inference_steps": 2}

    def run(callback=None):
        g = torch.Generator().manual_seed(0)
        return pipe("a cat", **size, generator=g, output_type="pt", callback_on_step_end=callback).images

    wanted = run()
    pipe.fit("4GB", device="cpu", **size)
    if way == "ring":
        pipe.apply(pipe._plan.replace(rows=tuple(replace(r, home="disk") for r in pipe._plan.rows)))

    def tighten(pipe, index, timestep, tensors):
        if index == 0:
            lane_to(torch.device("cpu")).release()  # the next step makes the ring anew
            limit({"ring": 256 << 10, "activations": 1 << 20}[way])
        return tensors

    picture = run(tighten)
    report = pipe.memory_report()
    print("RESULTS", json.dumps([torch.equal(picture, wanted), list(report.notes)]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited there only")
@pytest.mark.parametrize("way", ["ring", "activations"])
def test_a_process_without_memory_goes_on(way: str) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, way], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    same, notes = json.loads(done.stdout.rpartition("RESULTS")[2])
    assert same, "another picture"
    said = {"ring": "bytes of weights don't fit", "activations": "DefaultCPUAllocator: can't allocate memory"}[way]
    assert any("memory ran out in" in note and said in note for note in notes), notes
