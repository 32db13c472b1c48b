"""The fixtures that several test files share, and what pytest is told: which device the tests see, and that a SIGTERM
ends them. .pytest.ini names this file as a plugin, so that the tests of every folder have it."""
import os
import signal
import sys

import pytest

# ---- a tiny model, and a run of seconds ------------------------------------------------------------------------------
# They import tests.shared themselves: it imports torch, which reads the variables that pytest_configure sets.


@pytest.fixture
def tiny():
    """A random tiny CogVideoX in our class and in the stock one, same weights."""
    from tests import shared
    return shared.tiny_models()


@pytest.fixture
def inputs():
    """Latents, text, timesteps and a reference for it, two of each."""
    from tests import shared
    return shared.tiny_inputs()


@pytest.fixture(scope="module")
def knobs(tmp_path_factory):
    """The knobs of a run of seconds on a small toy world; every test that trains starts from these."""
    from tests import shared
    return shared.small_knobs(tmp_path_factory.getbasetemp() / "toy")


# ---- pytest itself ---------------------------------------------------------------------------------------------------

def pytest_configure(config):
    # `pytest -m gpu` alone sees a GPU: the other tests compare bits, which only a CPU repeats, and only on one thread.
    if config.option.markexpr != "gpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: fixtures end the processes they started


def pytest_unconfigure(config):
    """End what the tests have started and not ended, with all of its children."""
    shared = sys.modules.get("tests.shared")
    if shared is None:
        return
    for process in shared.STARTED:
        if process.poll() is None:
            shared.kill_job(process)


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
