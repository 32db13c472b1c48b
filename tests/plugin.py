"""What pytest is told, in every folder: .pytest.ini names this file. It comes before anything imports torch, which
reads the variables that are set here; only then it brings the fixtures of conftest.py."""
import os
import signal

import pytest


def pytest_configure(config):
    # `pytest -m gpu` alone sees a GPU: the other tests compare bits, which only a CPU repeats, and only on one thread.
    if config.option.markexpr != "gpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what the tests have started ends with them
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a job in the background ignores it, and hands that on
    config.pluginmanager.import_plugin("tests.conftest")


@pytest.hookimpl(tryfirst=True)  # before xdist's own
def pytest_xdist_auto_num_workers(config):
    """The whole suite takes two processes, one for each core of a small machine. `pytest FILE` takes one, and so does
    a GPU, because its memory is not shared out."""
    return 0 if config.option.file_or_dir or config.option.markexpr == "gpu" else 2


def pytest_collection_modifyitems(items):
    """The files that take longest come first: else one of them runs alone at the end."""
    longest = ["test_bench", "test_runs", "test_method", "test_prepare"]
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))
