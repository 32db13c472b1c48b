"""Fixtures that several test files share, and what pytest is told. .pytest.ini names this file as a plugin: so the tests
of every folder have it, and pytest_configure sets its variables before anything imports torch, which reads them."""
import os
import signal
import sys
from functools import partial

import pytest


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


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """The toy as a newcomer has it, in a folder where the tests then run. Without a GPU its data are few."""
    from tests import shared
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "toy").mkdir()
    for name in ("base", "lora", "refs"):
        (folder / "toy" / name).symlink_to(shared.ROOT / "toy" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if not shared.torch.cuda.is_available():
            for name, write in shared.creatures.DATA.items():
                patch.setitem(shared.creatures.DATA, name, partial(write, n=8))
        yield folder


def pytest_configure(config):
    # `pytest -m gpu` alone sees a GPU: the other tests compare bits, which only a CPU repeats, and only on one thread.
    if config.option.markexpr != "gpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: fixtures end the processes they started


def pytest_unconfigure(config):
    """End what the tests have started and not ended, with all of its children."""
    if shared := sys.modules.get("tests.shared"):
        for process in shared.STARTED:
            shared.kill_job(process)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite takes two processes, one for each core of a small machine. `pytest FILE` takes one, and so does
    a GPU, because its memory is not shared out."""
    option, in_worker = config.option, hasattr(config, "workerinput")
    if not option.file_or_dir and option.markexpr != "gpu" and not in_worker and config.pluginmanager.hasplugin("xdist"):
        option.numprocesses, option.dist, option.loadscopereorder = option.numprocesses or 2, "loadscope", False


def pytest_collection_modifyitems(items):
    """The files that take longest come first: else one of them runs alone at the end."""
    longest = ["test_bench", "test_runs", "test_levers", "test_method", "test_prepare", "test_ends"]
    items.sort(key=lambda item: (longest.index(item.path.stem) if item.path.stem in longest else len(longest)))
