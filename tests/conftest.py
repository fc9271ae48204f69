"""Settings for every test: where Triton kernels run, one CPU thread, a fixed seed (or `$PATCHLIGHT_TEST_SEED`)."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE / "golden", HERE / "fuzz"):
    sys.path.insert(0, str(folder))  # so that any test file can `import harness` or `import parity`

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read by Triton when a kernel is defined, so before any import of the project

import pytest  # noqa: E402
from parity import SEED  # noqa: E402


def pytest_collection_modifyitems(items):
    """Tests that compile come first: with short tests at the end, no process waits long for another."""
    items.sort(key=lambda item: item.path.name != "test_compiled_ahead.py")


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(SEED)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param
