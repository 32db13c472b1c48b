"""How much and how smoothly videos move: dynamic degree, smoothness (Table 2), and the split by optical flow (E.2.1).

Optical flow is a function flow(a, b): uint8 frames (H,W,3) -> how far each pixel moves, (H,W,2) px.
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.media import read_text


def dynamic_degree(frames, fps, flow):
    """Does the video move? The table has the share of videos that do, in per cent: always k/n.

    VBench's rule (arXiv 2311.17982): take every max(1, round(fps/8))-th frame, and optical flow from each to the next.
    A pair moves when the mean length of its largest 5 % (px) is above 6 * min(H,W)/256. A video moves with at least
    round(4 * frames/16) such pairs. 49 frames of 480x720: above 11.25 px, 12 of 48 pairs. Its flow is RAFT.

    A panning camera, flicker, a cut and a melting subject all move; slow motion counts nothing; and small differences
    of n = 120 videos are noise (+-4 points).
    """
    frames = frames[::max(1, round(fps / 8))]
    if len(frames) < 3:  # round(4 * 2/16) is 0: VBench calls such a clip moving, whatever it shows
        raise ValueError(f"too short: {len(frames)} frames at 8 fps, and dynamic degree needs 3")
    moving = 0
    for a, b in zip(frames, frames[1:]):
        lengths = np.linalg.norm(flow(a, b), axis=2).ravel()
        largest = int(0.05 * len(lengths))
        moving += np.partition(lengths, -largest)[-largest:].mean() > 6 * min(a.shape[:2]) / 256
    return moving >= round(4 * len(frames) / 16)


def dis_flow():
    """OpenCV's DIS optical flow: needs no weights. It loses objects that jump farther than their own size."""
    try:
        import cv2
    except ImportError:
        raise ValueError("no OpenCV: pip install -r paper/requirements-eval.txt")
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return lambda a, b: dis.calc(*(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in (a, b)), None)


def raft_flow(device):
    """RAFT-large with 20 iterations, trained on FlyingChairs and FlyingThings3D as VBench's is: torchvision's weights
    C_T_V1, "ported from the original paper"."""
    try:
        from torchvision.models.optical_flow import Raft_Large_Weights, raft_large
        raft = raft_large().eval().to(device)
        raft.load_state_dict(Raft_Large_Weights.C_T_V1.get_state_dict(check_hash=True, weights_only=True))
    except (ImportError, RuntimeError, OSError) as e:  # a torchvision of another torch fails with the second
        raise ValueError(f"no RAFT ({str(e)[:90]}): install the torchvision of torch {torch.__version__}, which "
                         "downloads the weights once, or pass --flow dis")

    @torch.no_grad()
    def flow(a, b):
        x = torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
        (h, w), (up, left) = x.shape[2:], (-x.shape[2] % 8 // 2, -x.shape[3] % 8 // 2)
        x = F.pad(x, (left, -w % 8 - left, up, -h % 8 - up), mode="replicate")  # RAFT takes whole eights
        moved = raft(x[:1], x[1:], num_flow_updates=20)[-1][0]
        return moved[:, up:up + h, left:left + w].permute(1, 2, 0).cpu().numpy()
    return flow


def vbench_smoothness(file):
    """{video name: per cent} from VBench's own result file (its motion_smoothness, run in its own environment): how
    well AMT-S draws every second frame from its neighbours. A still picture scores 100."""
    try:
        videos = json.loads(read_text(file))["motion_smoothness"][1]
        return {Path(v["video_path"]).stem: 100 * float(v["video_results"]) for v in videos}
    except (ValueError, LookupError, TypeError) as e:
        raise ValueError(f"--vbench {file} is no VBench result with motion_smoothness: {e!r}")


def flow_class(frames, flow, mask):
    """"small", "medium", "large" or "camera": the class of a clip at 720x480, whose pixels the thresholds are in.

    Sec. E.2.1: optical flow from the first frame to each later one, its length averaged over the foreground and over
    the background, then over frames. A background above 10 px is a moving camera: the clip is left out. Foreground <=
    25: small; <= 50: medium; else large. mask (H,W), true on the foreground of the first frame; true everywhere, no
    camera is found.
    """
    if not mask.any():
        raise ValueError("its mask shows no foreground")
    length = np.mean([np.linalg.norm(flow(frames[0], frame), axis=2) for frame in frames[1:]], axis=0)  # (H,W)
    if not mask.all() and length[~mask].mean() > 10:
        return "camera"
    foreground = length[mask].mean()
    return "small" if foreground <= 25 else "medium" if foreground <= 50 else "large"
