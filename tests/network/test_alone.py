"""`network/` on its own: copied into another package, where neither LeRobot nor transformers can be imported."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from conftest import CAMERAS, DIMS, make_batch, tiny_config

import lerobot_pi0
from lerobot_pi0 import PI0Policy
from lerobot_pi0.network.pi0 import PI0

ALONE = """
import sys

for name in ("lerobot", "transformers", "lerobot_pi0", "xxhash"):
    sys.modules[name] = None  # every import of these fails

import torch
from copied.network import solvers
from copied.network.pi0 import PI0, Observation
from copied.network.sizes import EXPERT_PRESETS, PALIGEMMA_PRESETS, Architecture

given = torch.load("given.pt")
model = PI0(Architecture(PALIGEMMA_PRESETS["tiny"], EXPERT_PRESETS["tiny"]), 64).eval()
model.load_state_dict(given["weights"])
with torch.no_grad():
    context = model.context(Observation(*given["observation"]))
    field = lambda x, time, embedding: model.velocity(x, embedding, context)
    chunk = solvers.integrate(field, model.embed_time, given["noise"])
torch.save(chunk, "chunk.pt")
"""


def test_a_copy_gives_the_same_chunk(tmp_path):
    """Catches an import, a registration or a change from outside that the network cannot do without: the process has
    only torch, einops and the copy. Its chunk is compared with the policy's, which has its kernels, in float32."""
    torch.manual_seed(0)
    policy = PI0Policy(tiny_config())
    batch, noise = make_batch(size=64), torch.randn(2, 50, 32)
    observation = tuple(policy.observe(batch, torch.device("cpu")))
    weights = policy.model.state_dict()
    torch.save({"weights": weights, "observation": observation, "noise": noise[:, None]}, tmp_path / "given.pt")
    shutil.copytree(Path(lerobot_pi0.__file__).parent / "network", tmp_path / "copied/network")
    (tmp_path / "copied/__init__.py").touch()
    (tmp_path / "alone.py").write_text(ALONE)
    done = subprocess.run([sys.executable, "alone.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "chunk.pt")[:, 0, :, :DIMS]
    assert torch.equal(found, policy.predict_action_chunk(batch, noise=noise))


def test_the_parts_that_are_compared():
    """Catches a comparison of the plain network with itself: the policy's layers are the faster ones."""
    policy, plain = PI0Policy(tiny_config(CAMERAS[:1])), PI0(tiny_config(CAMERAS[:1]).architecture(), 64)
    ours, theirs = ({type(m) for m in network.modules()} for network in (policy.model, plain))
    assert {cls.__module__.split(".")[1] for cls in ours - theirs} == {"kernels"}
    assert not [cls for cls in theirs if "kernels" in cls.__module__]
