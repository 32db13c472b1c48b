"""What pytest itself is told: which device the tests see, and that a SIGTERM ends them."""
import os
import signal
import sys

import pytest


def pytest_configure(config):
    # `pytest -m gpu` alone sees a GPU: the other tests compare bits, which only a CPU repeats.
    os.environ["TESTS_ON"] = "gpu" if config.getoption("markexpr") == "gpu" else "cpu"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: fixtures end the processes they started


def pytest_unconfigure(config):
    """End what the tests have started and not ended, with all of its children."""
    common = sys.modules.get("tests.shared")
    if common is None:
        return
    for process in common.STARTED:
        if process.poll() is None:
            common.kill_job(process)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite takes two processes, one for each core of a small machine. `pytest FILE` takes one, and so does
    a GPU, because its memory is not shared out."""
    whole = not config.option.file_or_dir and config.option.markexpr != "gpu"
    if whole and config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput"):
        if config.option.numprocesses is None:
            config.option.numprocesses, config.option.dist = 2, "loadscope"
            config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The files that take longest come first: else one of them runs alone at the end."""
    longest = ["test_bench", "test_runs", "test_levers", "test_method", "test_prepare", "test_ends"]

    def place(item):
        return longest.index(item.path.stem) if item.path.stem in longest else len(longest)
    items.sort(key=place)
