"""`lerobot-pi0 plan`: what it counts is what there is, by hand, by law, and as measured."""

import importlib
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CAMERAS, DIMS, features, tiny_config, write_dataset
from lerobot.configs.default import PeftConfig
from progress import bars
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from lerobot_pi0 import PI0Config, PI0Policy
from lerobot_pi0.kernels import absent, rounding
from lerobot_pi0.network.pi0 import PI0, Observation
from lerobot_pi0.tools import main
from lerobot_pi0.tools.cached_plan import about, operations
from lerobot_pi0.tools.memory import Count, Counter, Load, largest_batch, peak_at
from lerobot_pi0.tools.plan import MODES
from lerobot_pi0.training.context_store import Manifest, made_from

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MICRO = {
    "paligemma_variant": "tiny", "action_expert_variant": "tiny", "max_state_dim": 8, "max_action_dim": 8,
    "chunk_size": 4, "n_action_steps": 2,
}  # fmt: skip
LOAD = Load(((16, 16),), 60)


@pytest.fixture(autouse=True)
def logs(monkeypatch, caplog) -> None:
    """The command sets logging up anew, which would take it away from pytest."""
    monkeypatch.setattr("lerobot_pi0.tools.init_logging", lambda: None)
    caplog.set_level(logging.INFO, "lerobot_pi0")


def counter(adapter: dict | None = None, **options) -> Counter:
    config = PI0Config(**features(CAMERAS[:1], DIMS, 16), device="cpu", **MICRO, **options)
    return Counter(config, adapter)


@pytest.mark.parametrize("mode", MODES)
def test_weights_gradients_and_states(micro, mode):
    """Catches a dtype that is not training's, states that are missing, and frozen weights that get a gradient."""
    options, adapted = MODES[mode]
    options = {"dtype": "bfloat16"} | options
    name = {"pretrained_path": "base"} if adapted else {}
    found = counter(vars(PeftConfig(r=2)) if adapted else None, **options, **name)
    own, left_out = found.trained(), absent.names(found.policy)
    total = sum(p.numel() for name, p in found.policy.named_parameters() if name not in left_out)
    assert bool(left_out) == ("cached" in mode)
    x = found.count(2, LOAD)
    assert 0 < own <= total
    assert x.gradients == 4 * own
    steps = 4 * sum(p.requires_grad for p in found.policy.parameters())  # AdamW counts the steps of each weight
    assert x.optimizer == 8 * own + steps
    buffers = sum(b.nbytes for b in found.policy.buffers())
    assert x.weights == 4 * own + 2 * (total - own) + buffers
    assert x.peak >= x.weights + x.gradients + x.optimizer
    assert x.peaks["forward"] >= x.weights + x.optimizer + x.activations


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("adapted", [False, True], ids=["expert", "LoRA"])
def test_a_rounded_vlm(micro, monkeypatch, kind, adapted):
    """Catches rounded weights that are counted as they were, or on this machine's terms: it may have no kernel for
    them; gradients and steps that a rounded VLM changes."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    options = {"dtype": "bfloat16", "train_expert_only": True, "pretrained_path": "base"}
    adapter = vars(PeftConfig(r=2)) if adapted else None
    plain, found = counter(adapter, **options), counter(adapter, **options, vlm_quantization=kind)
    layers = rounding.layers(found.policy).values()
    assert len(layers) > 10 and found.trained() == plain.trained()
    x, y = plain.count(2, LOAD), found.count(2, LOAD)
    numbers, channels = sum(m.weight.numel() for m in layers), sum(m.out_features for m in layers)
    blocks = sum(-(-m.weight.numel() // 64) for m in layers)
    eight = numbers + 4 * channels
    scales = {"int8": eight, "fp8": eight, "nf4": numbers / 2 + 4 * blocks + 64 * len(layers)}[kind]
    assert y.weights == pytest.approx(x.weights - 2 * numbers + scales, rel=1e-3)
    assert (y.gradients, y.optimizer) == (x.gradients, x.optimizer)
    assert y.activations == pytest.approx(x.activations, rel=0.05)


def test_averages_count(micro):
    """Catches an average of the weights that is left out."""
    plain, averaged = (counter(train_expert_only=True, ema_decay=decay) for decay in (0, 0.99))
    assert averaged.count(1, LOAD).optimizer == plain.count(1, LOAD).optimizer + 4 * plain.trained()


def test_states_of_8_bits():
    """Catches states that are counted as larger or smaller than bitsandbytes' are, and averages that are left out."""
    config = tiny_config(CAMERAS[:1], train_expert_only=True, optimizer_8bit=True, ema_decay=0.9)
    own = PI0Policy(config).get_optim_params()
    optimizer = config.get_optimizer_preset().build(own)
    for p in own:
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = [x for p in own for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
    found = Counter(config)
    x = found.count(1, Load(((64, 64),), 20))
    assert x.optimizer == sum({x.data_ptr(): x.nbytes for x in [*states, *own.averages]}.values())
    assert 6 * found.trained() < x.optimizer < 7 * found.trained()  # two bytes a weight, and four of the average
    assert x.peaks["optimizer"] < 1.01 * (x.weights + x.gradients + x.optimizer)  # one weight at a time


def test_the_optimizer_of_a_gpu(micro):
    """Catches temporaries of AdamW's step, as much again as the trained weights, that its fused kernel does not need:
    runs take it on CUDA."""
    found = counter(train_expert_only=False)
    x = found.count(1, LOAD)
    idle = x.weights + x.gradients + x.optimizer
    assert idle <= x.peaks["optimizer"] < idle + 2 * found.trained()


def test_what_activations_depend_on(micro):
    """Catches activations that do not grow with the batch, that a frozen VLM keeps, that checkpointing does not free,
    and draws that do not share the pictures."""
    every, frozen, light = (
        counter(**options) for options in (
            {"train_expert_only": False}, {"train_expert_only": True},
            {"train_expert_only": False, "gradient_checkpointing": True},
        )
    )  # fmt: skip
    kept = {size: every.count(size, LOAD).activations for size in (1, 2, 3)}
    assert kept[3] - kept[2] == pytest.approx(kept[2] - kept[1], rel=1e-2) and kept[2] > kept[1]
    assert frozen.count(3, LOAD).activations < 0.5 * kept[3]
    assert light.count(3, LOAD).activations < 0.5 * kept[3]
    several = counter(train_expert_only=False, flow_samples=4)
    assert kept[3] < several.count(3, LOAD).activations < 3 * kept[3]
    assert every.count(3, LOAD).activations == kept[3]  # nothing is left over from the steps before


def test_the_straight_line_is_safe(micro):
    """Catches a peak between two counts that is higher than the line that stands for it."""
    found = counter(train_expert_only=True)
    counts = {size: found.count(size, LOAD) for size in (1, 8, 64)}
    for size in (2, 5, 20, 40):
        peak = found.count(size, LOAD).peak
        assert peak <= 1.01 * peak_at(counts, size) <= 1.5 * peak  # a single sample is less copied
    assert peak_at(counts, 8) == counts[8].peak
    assert peak_at(counts, 128) == pytest.approx(found.count(128, LOAD).peak, rel=0.05)


def test_the_largest_batch():
    """Catches a batch that does not fit, or one that is smaller than it has to be."""
    counts = {size: Count(0, 0, 0, 0, {"forward": 50, "backward": 40 + 10 * size}) for size in (1, 8, 64)}
    fits = {49: 0, 50: 1, 60.5: 2, 129: 8, 130.5: 9, 1045: 100, 10_045: 1000}
    assert {limit: largest_batch(counts, limit) for limit in fits} == fits
    assert (counts[1].at, counts[8].at) == ("forward", "backward")


CLI = ["--policy.type=pi0", *(f"--policy.{name}={value}" for name, value in MICRO.items())]


def test_the_command(micro, capsys):
    """Catches a mode without a line, numbers of another batch, and a card of which nothing is left to CUDA."""
    assert main(["plan", *CLI, "--batch_size=2", "--cameras=1", "--cards_gb=[1, 1.5]", "--json"]) == 0
    said = capsys.readouterr()
    content = json.loads(said.out)
    assert list(content["modes"]) == list(MODES) and "modes" in bars(said.err)
    assert content["cameras"] == [[480, 640]] and content["prompt_tokens"] == 128
    for found in content["modes"].values():
        assert found["largest batch"]["1"] == 0 < found["largest batch"]["1.5"]
        assert found["peak"] >= found["weights"] + found["optimizer"]
    assert main(["plan", *CLI, "--batch_size=2", "--modes=[everything]"]) == 0
    text = capsys.readouterr().out
    assert "2 cameras (480 x 640, 480 x 640)" in text and "everything" in text and "LoRA" not in text
    assert main(["plan", *CLI, "--policy.vlm_quantization=int8", "--batch_size=2"]) == 0
    text = capsys.readouterr().out
    assert "VLM in int8" in text and text.count("frozen VLM") == 2 and "everything" not in text
    assert "cached contexts: " in text and "one epoch over the cached frames" in text


def test_options_of_a_checkpoint(tmp_path, capsys):
    """Catches a plan for other options than training would take from the checkpoint."""
    config = tiny_config(CAMERAS[:1], flow_samples=8)
    PI0Policy(config).save_pretrained(tmp_path)
    plan = ["plan", f"--policy.path={tmp_path}", "--batch_size=2", "--modes=[everything]", "--json"]
    assert main(plan) == 0
    found = json.loads(capsys.readouterr().out)
    assert main([*plan, "--policy.flow_samples=8"]) == 0
    assert found == json.loads(capsys.readouterr().out) and found["flow_samples"] == 8


def test_what_cannot_be_planned(caplog):
    """Catches a traceback where there is no such mode, no such policy, or no sample."""
    assert main(["plan", *CLI, "--modes=[half]"]) == 1
    assert main(["plan", "--policy.type=act"]) == 1
    assert main(["plan", *CLI, "--batch_size=0"]) == 1
    assert main(["plan", *CLI, "--policy.vlm_quantization=nf4", "--modes=[everything]"]) == 1
    for said in ("half: there are frozen VLM", "another policy", "at least 1", "rounds a VLM that is frozen"):
        assert said in caplog.text


@pytest.mark.slow
def test_as_measured(monkeypatch):
    """Catches whatever the count leaves out: it is within 10 % of what a process takes, in eight configurations."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    try:
        results = importlib.import_module("plan").main(["--size", "medium"])
    finally:
        for name in ("plan", "cached_steps", "measure", "subjects"):
            sys.modules.pop(name, None)
    assert len(results) == 8
    for name, result in results.items():
        assert abs(result.deviation) < 0.1, name


def test_cached_contexts(micro, tmp_path, capsys):
    """Catches a context of another size than is written, a VLM that is counted, arithmetic that torch counts otherwise,
    and a plan for cached contexts that shows what the options rule out."""
    config = PI0Config(**features(CAMERAS[:1], DIMS, 16), device="cpu", **MICRO, flow_samples=3)
    found = about(config, LOAD, 2, 20)
    manifest = Manifest(
        **made_from(config), vlm_digest="", cameras=[], bits=None, image_tokens=4, prompt_tokens=LOAD.prompt, frames=1,
        every=1, batch_size=1, dataset="", dataset_frames=1, checkpoint="",
    )  # fmt: skip
    assert found["bytes of a frame"] == manifest.record_bytes == found["bytes read by a step"] / 2
    assert found["bytes of a frame in 8 bits"] == replace(manifest, bits=8).record_bytes
    assert found["pays from step"] == 10
    write_dataset(tmp_path / "data", cameras=CAMERAS[:1])
    command = [
        "plan",
        *CLI,
        "--policy.context_cache=contexts",
        "--dataset.repo_id=a/b",
        f"--dataset.root={tmp_path / 'data'}",
    ]
    assert main([*command, "--batch_size=2"]) == 0
    text = capsys.readouterr().out
    assert "all 12 frames are 0 GB" in text and "as much as 6 steps" in text
    assert text.count("cached contexts  ") == 2 and "everything" not in text


def test_the_arithmetic():
    """Catches a figure that is not torch's: operations at full size, counted on tensors without numbers."""
    config = PI0Config(**features(CAMERAS, DIMS, 224), device="cpu")
    prefix, expert = operations(config, Load(((224, 224),) * 3, 48))
    with torch.device("meta"):
        model = PI0(config.architecture(), config.image_size)
        obs = Observation(
            torch.empty(1, 3, 3, 224, 224), torch.empty(1, 48, dtype=torch.long), torch.ones(1, 48, dtype=torch.bool),
            torch.empty(1, 32),
        )  # fmt: skip
        with (
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
            torch.nn.attention.sdpa_kernel(SDPBackend.MATH),
        ):
            model.encode_prefix(obs)
    assert prefix == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert prefix / (prefix + expert) == pytest.approx(3.81 / 3.93, rel=0.01)
