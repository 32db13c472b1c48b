"""Fixtures, which plugin.py brings to the tests of every folder."""
from functools import partial

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

import model
from tests.shared import ROOT, C, H, L, T, W, small_knobs
from toy import creatures


@pytest.fixture
def tiny():
    """A random tiny CogVideoX in our class and in the stock one, same weights."""
    torch.manual_seed(0)
    config = dict(num_attention_heads=2, attention_head_dim=16, in_channels=C, out_channels=C, time_embed_dim=8,
                  text_embed_dim=12, num_layers=3, sample_width=W, sample_height=H, sample_frames=9,
                  max_text_seq_length=L, use_rotary_positional_embeddings=True)
    ours, stock = model.SubjectTransformer(**config).eval(), CogVideoXTransformer3DModel(**config).eval()
    stock.load_state_dict(ours.state_dict())
    return ours, stock


@pytest.fixture
def inputs():
    """Latents, text, timesteps and a reference for it, two of each."""
    g = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, T, C, H, W, generator=g), torch.randn(2, L, 12, generator=g)
    return latents, text, torch.tensor([300, 700]), torch.randn(2, 1, C, H, W, generator=g)


@pytest.fixture(scope="module")
def knobs(tmp_path_factory):
    """The knobs of a run of seconds on a small toy world; every test that trains starts from these."""
    return small_knobs(tmp_path_factory.getbasetemp() / "toy")


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """The toy as a newcomer has it, in a folder where the tests then run. Without a GPU its data are few."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "toy").mkdir()
    for name in ("base", "lora", "refs"):
        (folder / "toy" / name).symlink_to(ROOT / "toy" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if not torch.cuda.is_available():
            for name, write in creatures.DATA.items():
                patch.setitem(creatures.DATA, name, partial(write, n=4))
        yield folder
