"""Counts of kernel launches, waits for the device and matrix products on a GPU, of this policy and of the built-in.

No kernel runs: the policies have their full size on fake CUDA tensors, which have shapes and a device but no numbers.
So every machine can count. An operator that computes or copies on the device is a launch; views and allocations are
not. Attention counts as one launch, because its kernels are fused. A copy between host and device that is not
asynchronous is a wait, and so is a value that the host reads.

    python benchmarks/launches.py            a table
    python benchmarks/launches.py --json     the same for programs

Axes: B batch, K flow samples, T steps of a chunk, A action dim.
"""

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from presets import SIZES, Size
from schedule import scheduled
from subjects import CHUNK, Builtin, Ours, Policy, batch_for
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lerobot_pi0 import PI0Policy, kernels
from lerobot_pi0.control.sampling import Sampler
from lerobot_pi0.kernels import compiled_layers
from lerobot_pi0.kernels.cuda_graphs import CudaGraphs
from lerobot_pi0.training.optimizers import use_fused_kernel

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_int_mm", "_scaled_mm"}
READS: dict[str, Callable[[list[Any]], Any]] = {
    "tolist": lambda values: values,
    "numpy": np.array,
    "item": lambda values: values[0],
    "__bool__": lambda values: bool(values[0]),
    "__int__": lambda values: int(values[0]),
    "__float__": lambda values: float(values[0]),
}
"""What each method of a tensor that reads numbers returns, given these numbers."""

MASK_ALIGNMENT = 8
"""PyTorch copies a mask for its fused kernel if the mask's rows do not begin at multiples of this many numbers."""


WHY_NOT_COMPILED = "the built-in compiles ten steps of 18 layers as one graph, which takes too long to schedule here"


class Launches(TorchDispatchMode):
    """Counts launches by the operator's name, and waits by their reason."""

    def __init__(self, device: str, frozen: Iterable[Tensor]) -> None:
        """Begin at zero.

        Args:
            device: the type of the device whose launches are counted.
            frozen: weights whose products are also counted separately.
        """
        super().__init__()
        self.device = device
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []
        self.copies: list[str] = []  # from the host to the device
        self.frozen_products = 0
        self.paused = False
        self._frozen = {x.untyped_storage()._cdata for x in frozen}

    def here(self, x: Any) -> bool:
        """Whether this is a tensor on the device."""
        return isinstance(x, Tensor) and x.device.type == self.device

    @property
    def total(self) -> int:
        return self.launches.total()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if self.paused:
            return out
        name = function._schema.name.removeprefix("aten::")
        sources, targets = tree_leaves((args, kwargs)), tree_leaves(out)
        if not any(self.here(x) for x in (*sources, *targets)) or self._is_free(function, name):
            return out
        self.launches[name] += self._kernels(name, args)
        if name in PRODUCTS:
            self.frozen_products += any(x.untyped_storage()._cdata in self._frozen for x in sources if self.here(x))
        self._see_copy(name, args, kwargs, out)
        return out

    @staticmethod
    def _is_free(function: Any, name: str) -> bool:
        """Whether nothing is computed: a view, an allocation, or a property of a tensor."""
        returns = function._schema.returns
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        return views or name in ALLOCATIONS or name.startswith(("prim::", "profiler::"))

    @staticmethod
    def _kernels(name: str, args: Any) -> int:
        """Number of launches. Padding fills new memory and copies the tensor; padding by 0 only copies it."""
        return 1 + any(args[1]) if name == "constant_pad_nd" else 1

    def _see_copy(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        if name == "_local_scalar_dense":
            self.waits.append("value")
        if name not in ("_to_copy", "copy_"):
            return
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
        if source.device.type != target.device.type:
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            self.waits += [f"{source.device.type} to {target.device.type}"] * waits
            self.copies += ["host to device"] * self.here(target)


class OnFakeGPU(TorchFunctionMode):
    """Lets code run on fake CUDA tensors: attention with fused kernels, and made-up numbers where values are read."""

    def __init__(self, counter: Launches, answers: Callable[[Tensor], list[Any]]) -> None:
        """Count into `counter`.

        Args:
            answers: gives the numbers of a tensor that the host reads.
        """
        super().__init__()
        self._counter, self._answers = counter, answers

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and self._counter.here(args[0]):
            return self._attention(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in READS and isinstance(args[0], FakeTensor):
            self._counter.waits += [name] * self._counter.here(args[0])
            return READS[name](self._answers(args[0]))
        return function(*args, **kwargs)

    @staticmethod
    def _attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **kwargs: Any
    ) -> Tensor:
        """The kernel that PyTorch chooses on a GPU: flash attention without a mask, memory-efficient with one."""
        scale = kwargs.get("scale")
        if attn_mask is None:
            half = q.dtype in (torch.bfloat16, torch.float16)
            if half:
                return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, False, scale=scale)[0]
        elif any(stride % MASK_ALIGNMENT for stride in attn_mask.stride()[:-1]):
            missing = -attn_mask.shape[-1] % MASK_ALIGNMENT
            attn_mask = F.pad(attn_mask, (0, missing))[..., : attn_mask.shape[-1]]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, trains, dropout_p, False, scale=scale
        )[0]


@contextlib.contextmanager
def as_with_cuda() -> Iterator[None]:
    """Let torch treat fake CUDA tensors as real ones: for autocast, and for optimizer kernels over many weights."""
    with (
        mock.patch.object(FakeTensor, "tolist", Tensor.tolist),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *args: True),
        mock.patch("torch.utils._foreach_utils._foreach_supported_types", [Tensor, nn.Parameter, FakeTensor]),
        mock.patch("torch.optim.optimizer._foreach_supported_types", [Tensor, nn.Parameter, FakeTensor]),
        mock.patch("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", lambda: ["cuda"]),
        mock.patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: ["cuda"]),
    ):
        yield


class FakeGPU:
    """Fake tensors on a device, and counts of the operations on them."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def weight(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A weight with a shape, a dtype and a device, but without memory."""
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=self.device)

    def build(self, subject: Any, size: Size, **options: Any) -> Policy:
        """A policy in bfloat16, all of it on this device."""
        policy = subject.build(size, self.weight, "bfloat16", **options)
        for module in policy.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else self.weight(name, buffer.shape, buffer.dtype)
        policy.config.device = self.device
        if isinstance(policy, PI0Policy):
            with self.mode:
                kernels.join(policy.model)
        return policy

    def take(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch as fake tensors, on the device."""
        return {key: self.weight(key, x.shape, x.dtype) for key, x in batch.items()}

    @contextlib.contextmanager
    def count(
        self, answers: Callable[[Tensor], list[Any]] = lambda x: [1] * x.numel(), frozen: Iterable[Tensor] = ()
    ) -> Iterator[Launches]:
        """Count; `answers` gives the numbers of a tensor that the host reads."""
        counter = Launches(self.device, frozen)
        with as_with_cuda(), self.mode, counter, OnFakeGPU(counter, answers), self._scheduling(counter):
            yield counter

    def _scheduling(self, counter: Launches) -> contextlib.AbstractContextManager[Any]:
        """Let a compiled layer count as what Inductor schedules for it, once for all layers of the same shapes."""
        known: dict[Any, int] = {}

        def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                layer, *inputs = args
                counter.paused = True
                key = function, str([(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in tree_leaves(inputs)])
                if key not in known:
                    with _torch_calls_itself_compiling():
                        known[key] = scheduled(partial(function, layer), tuple(inputs), self.mode)
                out = function(*args)
                counter.paused = False
                counter.launches["compiled"] += known[key]
                return out

            return run

        return mock.patch.object(compiled_layers, "_compiled", compiled)


def _torch_calls_itself_compiling() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(torch.compiler, "is_compiling", lambda: True)


class OurChunk:
    """Our chunk on a fake GPU, from the observation to the actions."""

    def __init__(self, size: Size, cameras: int, **options: Any) -> None:
        self.gpu = FakeGPU()
        self.policy = self.gpu.build(Ours, size, **options)
        batch = self.gpu.take(batch_for(size, cameras))
        with self.gpu.mode:
            images = {key: x for key, x in batch.items() if "images" in key}
            prompt = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
            made = self.policy.observe.assemble(images, *prompt, batch[OBS_STATE])
            self.obs = made._replace(padded=False)
            self.noise = torch.empty(1, 1, CHUNK, self.policy.config.max_action_dim, device="cuda")
            self.policy.model.embed_time(torch.empty(1, device="cuda"))  # copies its frequencies to the device once

    def count(self, steps: int, sampler: Sampler | None = None, guide: Any = None) -> Launches:
        """Launches and waits of a chunk with this many Euler steps."""
        with self.gpu.count() as counter, torch.no_grad():
            (sampler or Sampler()).chunk(self.policy.model, self.obs, self.noise, guide, steps=steps)
        return counter

    def compiled(self, steps: int) -> Launches:
        """`count` with compiled layers."""
        kernels.compile_layers(self.policy.model, "default")
        return self.count(steps)


def chunk_of_ours(size: Size, cameras: int, steps: int) -> Launches:
    """Our chunk, kernel by kernel."""
    return OurChunk(size, cameras).count(steps)


class Captured:
    """Stands in for a CUDA graph: counts the launches that the graph would capture."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.counter = Launches("cuda", ())
        with self.counter:
            self.out = function()
        self.replays = 0

    def replay(self) -> None:
        """Count a replay."""
        self.replays += 1


def graph_counts(size: Size, cameras: int, steps: int) -> dict[str, int]:
    """Launches of our chunk inside CUDA graphs, and outside of them (copies of inputs and the result, replays)."""
    made: list[Captured] = []

    def record(function: Callable[[], Tensor]) -> Captured:
        made.append(Captured(function))
        return made[-1]

    chunk, sampler = OurChunk(size, cameras), Sampler(cuda_graphs=True)
    sampler.graphs = CudaGraphs(record)
    chunk.count(steps, sampler)
    replays = sum(x.replays for x in made)
    outside = chunk.count(steps, sampler).total
    return {
        "captured": sum(x.counter.total for x in made),
        "outside": outside + sum(x.replays for x in made) - replays,
        "graphs": len(made),
    }


def chunk_of_builtin(size: Size, cameras: int, steps: int) -> Launches:
    """The built-in's chunk, from the inputs that its `predict_action_chunk` makes from a batch."""
    gpu = FakeGPU()
    policy = gpu.build(Builtin, size)
    batch = gpu.take(batch_for(size, cameras))
    with gpu.mode, torch.no_grad():
        inputs = Builtin._inputs(policy, batch)
    with gpu.count() as counter, torch.no_grad():
        policy.model.sample_actions(*inputs, num_steps=steps)
    return counter


class Step:
    """A training step of a policy with a frozen VLM, on fake tensors."""

    def __init__(self, subject: Any, size: Size, batch_size: int, cameras: int, device: str) -> None:
        self.gpu = FakeGPU(device)
        with mock.patch("lerobot_pi0.kernels.install") if device == "cpu" else contextlib.nullcontext():
            options = {"cuda_graphs": False} if subject is Ours else {}
            self.policy = self.gpu.build(subject, size, training=True, **options)
        host = batch_for(size, cameras, batch_size=batch_size) | {"index": torch.arange(batch_size)}
        self.read = Answers()
        if isinstance(self.policy, PI0Policy):
            self.read.learn(self.policy.observe, host)
        self.batch = self.gpu.take(host)
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the policy's preset, after one step, in which it creates its states."""
        with as_with_cuda(), self.gpu.mode:
            self.policy.train()
            if isinstance(self.policy, PI0Policy):
                self.policy.model.embed_time(torch.empty(1, device=self.gpu.device))  # copies frequencies once
            optimizer = self.policy.config.get_optimizer_preset().build(self.policy.get_optim_params())
            for p in self.policy.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None
            if isinstance(self.policy, PI0Policy) and self.gpu.device == "cuda":
                use_fused_kernel(optimizer)  # as the guards do before the first step of a run
            optimizer.step()
        return optimizer

    def forward(self) -> tuple[Tensor, Launches]:
        """The loss of a batch that is already on the device, and its counts."""
        layers = "paligemma.model.language_model.layers"
        frozen = [p for name, p in self.policy.named_parameters() if layers in name]
        with self.gpu.count(self.read, frozen) as counter:
            return self.policy.forward(self.batch)[0], counter

    def backward(self, loss: Tensor) -> Launches:
        """The gradients of a loss."""
        self.optimizer.zero_grad()
        with self.gpu.count(self.read) as counter:
            loss.backward()
        return counter

    def update(self) -> Launches:
        """The optimizer's step with the present gradients."""
        with self.gpu.count(self.read) as counter:
            self.optimizer.step()
        return counter


def step(subject: Any, size: Size, batch_size: int, cameras: int = 3) -> list[Launches]:
    """Forward pass, backward pass and optimizer.

    On CUDA tensors autograd needs the driver, which a machine without a GPU lacks. So the backward pass is counted on
    fake CPU tensors, with the plain network.
    """
    on_gpu, on_cpu = (Step(subject, size, batch_size, cameras, device) for device in ("cuda", "cpu"))
    forward, update = on_gpu.forward()[1], on_gpu.update()
    return [forward, on_cpu.backward(on_cpu.forward()[0]), update]


class Answers(TorchFunctionMode):
    """The numbers that the host reads from a batch, learnt from a real batch; ones for all other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, list[Any]] = {}

    def learn(self, observe: Callable[..., Any], host: dict[str, Tensor]) -> None:
        """Remember the numbers that are read from a real batch."""
        with self:
            observe(host, torch.device("cpu"))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is Tensor.tolist:
            self._known[args[0].numel()] = out
        return out

    def __call__(self, x: Tensor) -> list[Any]:
        return self._known.get(x.numel()) or [1] * x.numel()


CHUNKS = {"ours": chunk_of_ours, "built-in": chunk_of_builtin}
STEPS = {"ours": Ours, "built-in": Builtin}
EULER = 10


def chunk_counts(name: str, size: Size, cameras: int) -> dict[str, Any]:
    """Counts of a chunk: eager, compiled and as a CUDA graph; and of one Euler step (the difference of one more)."""
    eager, less = (CHUNKS[name](size, cameras, steps).total for steps in (EULER, EULER - 1))
    counted = {"eager": eager, "per_step": eager - less}
    if name != "ours":
        return counted | {"compiled": None, "why": WHY_NOT_COMPILED, "graph": None}
    compiled = OurChunk(size, cameras).compiled(EULER).total
    return counted | {"compiled": compiled, "graph": graph_counts(size, cameras, EULER)}


def step_counts(name: str, size: Size, batch_size: int) -> dict[str, Any]:
    """Counts of a training step."""
    parts = step(STEPS[name], size, batch_size)
    waits = [wait for part in parts for wait in part.waits]
    return {
        "launches": sum(part.total for part in parts),
        "waits": len(waits),
        "waits_for": waits,
        "frozen_products": parts[0].frozen_products,
    }


def count_all(size: Size, names: Iterable[str], cameras: Iterable[int], batches: Iterable[int]) -> dict[str, Any]:
    """All counts, by subject."""
    return {
        name: {
            "chunk": {str(n): chunk_counts(name, size, n) for n in cameras},
            "step": {str(n): step_counts(name, size, n) for n in batches},
        }
        for name in names
    }


def table(counts: dict[str, Any]) -> str:
    """The counts as Markdown."""
    lines = ["| | ours | built-in |", "|---|---|---|"]
    for what in ("chunk", "step"):
        for n in counts["ours"][what]:
            rows = {name: counts[name][what][n] for name in counts}
            for key in rows["ours"]:
                if key in ("why", "waits_for"):
                    continue
                unit = f"{n} cameras" if what == "chunk" else f"batch {n}"
                lines.append(f"| {what}, {unit}: {key} | " + " | ".join(str(rows[x].get(key)) for x in rows) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--size", choices=SIZES, default="full", help="of the networks (default: full)")
    parser.add_argument("--cameras", type=int, nargs="+", default=[3, 1], help="of the chunks (default: 3 1)")
    parser.add_argument("--batches", type=int, nargs="*", default=[8], help="of the training steps (default: 8)")
    options = parser.parse_args(arguments)
    counts = count_all(SIZES[options.size], CHUNKS, options.cameras, options.batches)
    print(json.dumps(counts, indent=2) if options.json else table(counts))
    return counts


if __name__ == "__main__":
    main()
