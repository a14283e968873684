"""One graph of a whole chunk, proved without a GPU by a recorder (`graph_recorder.py`)."""

import copy
import functools
import pickle
import threading

import pytest
import torch
from conftest import DIMS, draws, make_batch, relative, shake, small_policy
from graph_recorder import Recorder, refuse
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch import Tensor

from lerobot_pi0.configuration_pi0 import choices
from lerobot_pi0.control import sampling
from lerobot_pi0.kernels import cuda_graphs, cuda_layers
from lerobot_pi0.kernels.cuda_graphs import CudaGraphs


@pytest.fixture
def gpu(small, monkeypatch):
    """Small presets, the CPU in the place of a GPU, and the recorder in the place of CUDA's graphs."""
    monkeypatch.setattr(cuda_layers, "ON", ("cuda", "cpu"))
    monkeypatch.setattr(sampling, "CudaGraphs", functools.partial(CudaGraphs, Recorder))
    monkeypatch.setattr(Recorder, "made", 0)


def policies(**options):
    """A policy whose chunks are recorded, and one of the same weights without graphs."""
    torch.manual_seed(0)
    options = {"rtc_config": RTCConfig(), "num_inference_steps": 3} | options
    graphed = small_policy(**options)
    shake(graphed)
    plain = small_policy(cuda_graphs=False, **options)
    plain.load_state_dict(graphed.state_dict())
    return graphed, plain


def chunk(policy, seed=0, batch_size=1, **options):
    noise = draws(seed, batch_size)[0]
    how = {"prompt": (9,) * batch_size} | options
    return policy.predict_action_chunk(make_batch(seed, batch_size, **how), noise=noise[:, 0])


@pytest.mark.parametrize("guide", [None, *choices("rtc_guidance")])
def test_new_inputs(gpu, guide):
    """Catches an input that a graph does not take (it would repeat the chunk of its capture), in each mode of real-time
    chunking, and a graph per chunk."""
    graphed, plain = policies(rtc_guidance=guide, rtc_training_max_delay=9 if guide == "trained" else 0)
    for i in range(3):
        batch, (noise, _) = make_batch(i, 1, prompt=(9,)), draws(i, 1)
        how = {"noise": noise[:, 0]}
        if guide is not None:
            left = torch.randn(10, DIMS, generator=torch.Generator().manual_seed(i))
            how |= {"inference_delay": i + 1, "prev_chunk_left_over": left}
        assert torch.equal(graphed.predict_action_chunk(batch, **how), plain.predict_action_chunk(batch, **how))
    assert Recorder.made == 1


def test_a_graph_of_inference_mode_serves_all():
    """Catches a graph that a caller's inference mode made, which nobody outside of it can use."""
    graphs, model, x = CudaGraphs(Recorder), torch.nn.Linear(2, 2), torch.ones(1, 2)
    with torch.inference_mode():
        first = graphs(model, model, (x,))
    with torch.no_grad():
        assert torch.equal(graphs(model, model, (x,)), first)


@pytest.mark.parametrize("solver", ["midpoint", "heun", "adaptive"])
def test_solvers(gpu, solver):
    """Catches a solver that cannot be recorded, and the adaptive one, which reads values, being recorded."""
    graphed, plain = policies(solver=solver)
    for i in range(2):
        assert torch.equal(chunk(graphed, i), chunk(plain, i))
    assert Recorder.made == (solver != "adaptive")


def swap(policy):
    for p in policy.model.expert.parameters():
        p.data = p.data * 1.1


def in_place(policy):
    with torch.no_grad():
        for p in policy.model.expert.parameters():
            p.mul_(1.1)


def replace_a_layer(policy):
    layer = policy.model.expert.layers[0].mlp.up_proj
    torch.manual_seed(1)
    policy.model.expert.layers[0].mlp.up_proj = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)


def move(policy):
    policy.to(torch.float64).to(torch.float32)
    swap(policy)


@pytest.mark.parametrize(("change", "graphs"), [(swap, 2), (in_place, 1), (replace_a_layer, 2), (move, 2)])
def test_weights_that_change(gpu, change, graphs):
    """Catches a graph that goes on reading the old memory of weights that were swapped (averages), moved or wrapped;
    and a capture for each optimizer step, which needs none."""
    graphed, plain = policies()
    before = chunk(graphed)
    for policy in (graphed, plain):
        change(policy)
    after = chunk(graphed, seed=0)
    assert torch.equal(after, chunk(plain, seed=0))
    assert relative(after, before) > 1e-4
    assert Recorder.made == graphs


def test_averages_are_deployed(gpu):
    """Catches a chunk of the trained weights where the averages are deployed."""
    graphed, plain = policies(ema_decay=0.5)
    batch, (noise, time) = make_batch(batch_size=1), draws(0, 1)
    for policy in (graphed, plain):
        chunk(policy)
        optimizer = policy.config.get_optimizer_preset().build(policy.train().get_optim_params())
        policy.forward(batch, noise=noise, time=time)[0].backward()
        optimizer.step()
        policy.update()
        policy.eval()
    assert torch.equal(chunk(graphed), chunk(plain))


def test_an_adapter(gpu):
    """Catches a graph without the adapter that was attached after it, and one with an adapter that was switched off."""
    graphed, _ = policies(train_expert_only=True, use_peft=True)
    without = chunk(graphed)
    graphed.config.pretrained_path = "somewhere"
    adapted = graphed.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 2, "init_lora_weights": False})
    inner = adapted.get_base_model() if hasattr(adapted, "get_base_model") else graphed
    adapted.eval()
    with_adapter = chunk(inner)
    assert relative(with_adapter, without) > 1e-4
    with adapted.disable_adapter():
        assert relative(chunk(inner), without) < 1e-5
    assert relative(chunk(inner), with_adapter) < 1e-6


def test_a_fifth_shape(gpu, monkeypatch, caplog):
    """Catches memory that grows with each shape, a wrong chunk of a shape that has no graph, and a shape that never
    gets one though another has not come for long."""
    graphed, plain = policies()
    for prompt in (5, 6, 7, 8, 9):
        assert torch.equal(chunk(graphed, prompt=(prompt,)), chunk(plain, prompt=(prompt,)))
    assert Recorder.made == cuda_graphs.KEPT
    assert "more than 4 shapes" in caplog.text
    monkeypatch.setattr(cuda_graphs, "FORGOTTEN", 3)
    for _ in range(2):
        chunk(graphed, prompt=(9,))
    assert Recorder.made == cuda_graphs.KEPT + 1


def test_warm_up(gpu, monkeypatch):
    """Catches a robot whose first chunks wait for kernels to be loaded, of its own prompt or of a guided chunk; a pause
    at each episode; and shapes of a warm-up that take the places of graphs."""
    seen = []
    plain = sampling.Sampler.chunk

    def chunk_of(self, model, obs, noise, guide=None, *args, **solver):
        seen.append((obs.tokens_BL.shape[1], guide is not None, obs.images_BNCHW.shape[1], solver["steps"]))
        return plain(self, model, obs, noise, guide, *args, **solver)

    monkeypatch.setattr(sampling.Sampler, "chunk", chunk_of)
    graphed, _ = policies()
    for _ in range(2):
        graphed.reset()
    assert seen == [(n, guided, 3, 3) for n in (8, 12) for guided in (False, True)]  # at most 12 tokens here
    assert Recorder.made == 0
    monkeypatch.setattr(cuda_layers, "ON", ("cuda",))
    policies()[0].reset()
    assert len(seen) == 4


def test_large_batches_are_not_captured(gpu):
    """Catches graphs of large batches, whose memory is theirs for good."""
    graphed, plain = policies()
    assert torch.equal(chunk(graphed, batch_size=5), chunk(plain, batch_size=5))
    assert Recorder.made == 0


def test_an_error_in_capture(gpu, caplog, monkeypatch):
    """Catches a robot that stops because its chunk cannot be captured, and a warning with each chunk."""
    monkeypatch.setattr(sampling, "CudaGraphs", functools.partial(CudaGraphs, refuse))
    graphed, plain = policies()
    for i in range(3):
        assert torch.equal(chunk(graphed, i), chunk(plain, i))
    assert caplog.text.count("no CUDA graph") == 1


def test_two_threads(gpu):
    """Catches two threads that put their inputs into the same graph at the same time."""
    graphed, plain = policies()
    expected = [chunk(plain, i) for i in range(2)]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def ask(seed):
        for _ in range(4):
            found[seed].append(chunk(graphed, seed))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, expected[seed]) for seed, chunks in found.items() for x in chunks)
    assert Recorder.made == 1 and sum(map(len, found.values())) == 8


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(gpu, duplicate):
    """Catches a copy that replays the original's graph, or cannot be made because of it."""
    graphed, _ = policies()
    chunk(graphed)
    other = duplicate(graphed)
    shake(other, seed=1)
    assert relative(chunk(other), chunk(graphed)) > 1e-3
    assert Recorder.made == 2


def test_the_recorder_would_tell(gpu):
    """Catches a recorder that proves nothing: a value that is read while it records is an error."""
    with pytest.raises(RuntimeError, match="a value is read"):
        Recorder(lambda: torch.ones(2) * torch.ones(2).sum().item())
