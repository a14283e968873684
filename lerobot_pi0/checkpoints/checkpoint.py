"""Weights in and out: which files a checkpoint has, which tensor goes where, and what is refused.

A network is built on the `meta` device and each tensor is read straight into its final place, dtype and device,
so that loading takes the memory of the model, and no weight is ever random by accident. A checkpoint is judged by
its names, shapes and configuration before any weight is read. How bytes are moved is in `streaming.py`.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import draccus
import torch
import xxhash
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..configuration_pi0 import PLUGIN_CONFIG_NAME, PLUGIN_FIELDS, PI0Config
from ..kernels import rounding
from . import streaming

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says what was found and what to do."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No such folder, repository or file, or no way to it."""


class CorruptCheckpointError(CheckpointError):
    """A file that is cut, unreadable, changed since it was written, or holds numbers that are not finite."""


class WrongPolicyError(CheckpointError):
    """A checkpoint of something else: another policy, π₀.₅, π₀-FAST, an adapter, a LeRobot before 0.4."""


class CheckpointConfigError(CheckpointError):
    """Options that do not describe a π₀, or that this checkpoint cannot keep."""


class MismatchedCheckpointError(CheckpointError):
    """Tensors that are missing, unexpected, or of another shape or kind than the network's."""


NETWORK = "model.paligemma_with_expert."
VLM = NETWORK + "paligemma."
LM_HEAD = VLM + "lm_head.weight"
EMBEDDING = VLM + "model.language_model.embed_tokens.weight"
EXPERT_HEAD = NETWORK + "gemma_expert.lm_head.weight"

# Known spellings of the same tensors, applied in this order. What follows in `index_tensors`: the head of the VLM is
# its embedding, and the head of the expert is read by nothing.
RENAMES = (
    # openpi writes the network without LeRobot's policy around it
    (re.compile(r"^(?!model\.)"), "model."),
    # transformers before 4.52 nested PaliGemma's parts the other way round; 5.5 writes them with both nestings
    (re.compile(r"\.paligemma\.(model\.)?language_model\.model\."), ".paligemma.model.language_model."),
    (re.compile(r"\.paligemma\.language_model\.lm_head\."), ".paligemma.lm_head."),
    (re.compile(r"\.paligemma\.(vision_tower|multi_modal_projector)\."), r".paligemma.model.\1."),
)

OLD_LEROBOT_KEYS = {
    "proj_width",
    "num_steps",
    "resize_imgs_with_padding",
    "adapt_to_pi_aloha",
    "attention_implementation",
}
DIGESTS = "lerobot_pi0.digests"
CONFIG_DIGEST = "lerobot_pi0.config"
"""Keys of a safetensors file's metadata: a digest per tensor, as JSON, and one of the config.json written with it."""


class Stored(NamedTuple):
    """Where a tensor of a checkpoint lies, and what its file says about it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0  # in the file, in bytes
    digest: str | None = None  # None where the file carries none


class Base(NamedTuple):
    """The checkpoint that frozen weights come from, when they are not written again."""

    id: str
    revision: str | None
    digest: str


def canonical_name(name: str) -> str:
    """The name that published checkpoints use today for a tensor of an older or bare one."""
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def hub_or_local(source: str | Path, filename: str, **hub: Any) -> Path | None:
    """A file of a checkpoint folder or Hub repository; None where the checkpoint has no such file.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint, or no way to it.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder / filename if (folder / filename).is_file() else None
    try:
        return Path(hf_hub_download(str(source), filename, **hub))
    except HFValidationError as error:
        raise CheckpointNotFoundError(f"{source} is neither a folder nor a Hub id of the form owner/name") from error
    except LocalEntryNotFoundError as error:
        if _known_to_lack(str(source), filename, **hub):
            return None
        raise CheckpointNotFoundError(
            f"{filename} of {source} is not in the local cache and the Hub cannot be reached (or offline mode is on); "
            "if it is meant to be a folder, there is none. Connect once, or pass the path of a downloaded folder"
        ) from error
    except EntryNotFoundError:
        return None
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise CheckpointNotFoundError(
            f"{source} is not on the Hub, or not for you: check the spelling, and `hf auth login` for what is private "
            "or gated"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{source} is on the Hub, but has no revision {hub.get('revision')!r}: name one of its branches, tags or "
            "commits (--policy.pretrained_revision), or none for the newest"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointNotFoundError(f"{source} cannot be had from the Hub: {error}") from error


def _known_to_lack(repo: str, filename: str, **hub: Any) -> bool:
    """Whether the cache tells that a repository has no such file.

    Once the Hub has said so, the cache remembers; `hf download` leaves no such note, but a snapshot that has its
    configuration counts as complete where the user asks for no network.
    """
    where = {"cache_dir": hub.get("cache_dir"), "revision": hub.get("revision")}
    if try_to_load_from_cache(repo, filename, **where) is _CACHED_NO_EXIST:
        return True
    offline = hub.get("local_files_only") or is_offline_mode()
    return offline and filename != CONFIG_NAME and isinstance(try_to_load_from_cache(repo, CONFIG_NAME, **where), str)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CorruptCheckpointError: the file is cut or is no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also what is no text, and numbers and nesting without end
        raise CorruptCheckpointError(f"{file} is no JSON ({error}): download or copy it again") from error
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{file} holds a {type(content).__name__} where an object was expected")
    return content


def read_config(source: str | Path, **hub: Any) -> PI0Config:
    """The configuration of a checkpoint, from its config.json.

    Raises:
        CheckpointError: there is none, it is cut, or it is not π₀'s.
    """
    content = check_config(source, **hub)
    if content is None:
        raise CheckpointNotFoundError(f"{source} holds no {CONFIG_NAME}: is it the folder `pretrained_model`?")
    try:
        with draccus.config_type("json"):
            config = draccus.decode(PI0Config, {k: v for k, v in content.items() if k != "type"})
        config.validate_features()
        return config
    except Exception as error:  # draccus raises what the parsed types raise; all of it means the same here
        raise CheckpointConfigError(f"{CONFIG_NAME} of {source} does not describe a π₀: {_reason(error)}") from error


def check_config(source: str | Path, **hub: Any) -> dict[str, Any] | None:
    """The content of a checkpoint's config.json, None where there is none.

    Raises:
        CheckpointError: it is cut, or names another policy.
    """
    file = hub_or_local(source, CONFIG_NAME, **hub)
    if file is None:
        if hub_or_local(source, "adapter_config.json", **hub) is not None:
            raise WrongPolicyError(_adapter(source))
        return None
    content = read_json(file)
    if old := OLD_LEROBOT_KEYS & content.keys():
        raise WrongPolicyError(
            f"{source} was written by a LeRobot before 0.4 ({', '.join(sorted(old))} in {CONFIG_NAME}), whose π₀ had "
            "other weights and normalised inside the model: take a current checkpoint, such as lerobot/pi0_base"
        )
    kind = content.get("type")
    if kind != "pi0":
        hint = {"pi05": " It is π₀.₅, another network.", "pi0_fast": " It is π₀-FAST, another network."}.get(
            str(kind), ""
        )
        raise WrongPolicyError(f"{CONFIG_NAME} of {source} says type={kind!r}, expected 'pi0'.{hint}")
    return content


def read_plugin_config(source: str | Path, **hub: Any) -> dict[str, Any]:
    """What only this plugin knows about a checkpoint; empty for checkpoints of others.

    Raises:
        CheckpointError: the file is cut, from a newer version of this plugin, or holds what no option can be.
    """
    file = hub_or_local(source, PLUGIN_CONFIG_NAME, **hub)
    if file is None:
        return {}
    content = read_json(file)
    if unknown := content.keys() - {*PLUGIN_FIELDS, "updates", "start", "base"}:
        raise CheckpointConfigError(
            f"{PLUGIN_CONFIG_NAME} of {source} holds {', '.join(sorted(unknown))}, which this version does not know: "
            "pip install --upgrade lerobot_policy_pi0"
        )
    options = {name: content[name] for name in PLUGIN_FIELDS if name in content}
    try:
        with draccus.config_type("json"):
            decoded = draccus.decode(PI0Config, options | {"device": "cpu"})
        base = content.get("base")
        return content | {
            **{name: getattr(decoded, name) for name in options},
            "updates": int(content.get("updates", 0)),
            "start": _text(content.get("start")),
            "base": None if base is None else Base(str(base["id"]), _text(base["revision"]), str(base["digest"])),
        }
    except Exception as error:  # as in `read_config`
        raise CheckpointConfigError(f"{PLUGIN_CONFIG_NAME} of {source} cannot be used: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What went wrong, with what it came from: draccus hides an option's own error behind one of its own."""
    cause = f" ({_reason(error.__cause__)})" if error.__cause__ is not None else ""
    return f"{error}{cause}" if isinstance(error, ValueError) else f"{error!r}{cause}"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def weight_files(source: str | Path, **hub: Any) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names.

    Raises:
        CheckpointError: the checkpoint has no weights, or lacks some.
    """
    if Path(source).is_dir():
        finish_interrupted_save(Path(source))
    single = hub_or_local(source, SAFETENSORS_SINGLE_FILE, **hub)
    if single is not None:
        return [single]
    index = hub_or_local(source, SAFETENSORS_INDEX_FILE, **hub)
    if index is None:
        if hub_or_local(source, "adapter_config.json", **hub) is not None:
            raise WrongPolicyError(_adapter(source))
        raise CheckpointNotFoundError(f"{source} holds no {SAFETENSORS_SINGLE_FILE}: is it `pretrained_model`?")
    shards = _shards(index)
    files = {shard: hub_or_local(source, shard, **hub) for shard in shards}
    if missing := [shard for shard, file in files.items() if file is None]:
        raise CheckpointNotFoundError(f"{source} lacks {', '.join(missing)}, which its index names")
    return [file for file in files.values() if file is not None]


def _shards(index: Path) -> list[str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and name for name in places.values()):
        raise CorruptCheckpointError(f"{index} does not say which file holds which tensor: download or copy it again")
    return sorted(set(places.values()))


def _adapter(source: str | Path) -> str:
    return (
        f"{source} holds a PEFT adapter, not a model: load it through LeRobot (--policy.path={source}), which loads "
        "the base that the adapter names first"
    )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, with the library's error made ours."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except SafetensorError as error:
        size = file.stat().st_size if file.exists() else 0
        raise CorruptCheckpointError(
            f"{file} ({size} bytes) is not a complete safetensors file: {error}. Download or copy it again"
        ) from error


def index_tensors(files: Iterable[Path], prefix: str = "") -> dict[str, Stored]:
    """Every tensor of the files by its canonical name; `prefix` is where a part of the network belongs.

    Raises:
        CheckpointError: a file is broken, or two tensors are the same one of the network.
    """
    found: dict[str, Stored] = {}
    for file in files:
        with _opened(file) as opened:
            digests, offsets = _digests(opened), streaming.data_offsets(file)
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                part, canonical = opened.get_slice(name), canonical_name(prefix + name)
                if canonical in found:
                    raise MismatchedCheckpointError(
                        f"{found[canonical].name} in {found[canonical].file} and {name} in {file} are the same tensor "
                        "of the network: take one of them out"
                    )
                digest = str(digests.get(name)) if digests else None  # "None" is no tensor's
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                found[canonical] = Stored(file, name, shape, dtype, offsets[name], digest)
    head = found.pop(LM_HEAD, None)  # the same matrix as the embedding, and sometimes the only copy
    if head is not None:
        found.setdefault(EMBEDDING, head)
    found.pop(EXPERT_HEAD, None)
    return found


def adapts_vlm(source: str | Path, **hub: Any) -> bool:
    """Whether a PEFT adapter has weights for the VLM."""
    file = hub_or_local(source, "adapter_model.safetensors", **hub)
    if file is None:
        return False
    with _opened(file) as opened:
        return any(VLM.removeprefix("model.") in name for name in opened.keys())  # noqa: SIM118


def revision_of(source: str | Path, **hub: Any) -> str | None:
    """The commit of a Hub checkpoint; None for a folder."""
    if Path(source).is_dir():
        return None
    snapshot = hub_or_local(source, CONFIG_NAME, **hub)
    return snapshot.parent.name if snapshot is not None else hub.get("revision")


def base_of(source: str | Path, **hub: Any) -> Base:
    """The checkpoint as a base of others; a folder by where it really is, as `last` will be another one soon."""
    folder = Path(source)
    name = str(folder.resolve()) if folder.is_dir() else str(source)
    return Base(name, revision_of(source, **hub), digest="")


def with_base(own: dict[str, Stored], base: Base | None, **hub: Any) -> dict[str, Stored]:
    """The tensors of a checkpoint's own files, and those that it leaves to its base."""
    if base is None:
        return own
    return index_tensors(weight_files(base.id, **{**hub, "revision": base.revision})) | own


SHAPING = ("paligemma_variant", "action_expert_variant", "max_state_dim", "max_action_dim", "image_resolution")
"""Options on which shapes of weights depend."""


def _advice(source: str | Path, config: PI0Config | None, **hub: Any) -> str:
    """For weights that do not fit: what the checkpoint's own config.json says otherwise."""
    if config is not None and (made := check_config(source, **hub)):
        asked = config.to_files()[CONFIG_NAME]
        options = [f"--policy.{name}={made[name]}" for name in SHAPING if made.get(name, asked[name]) != asked[name]]
        if options:
            return f"The checkpoint was made with {' '.join(options)}"
    return f"Check {', '.join(SHAPING)}"


def load_weights(
    policy: Any,
    source: str | Path,
    device: torch.device,
    strict: bool = True,
    base: Base | None = None,
    **hub: Any,
) -> dict[str, str]:
    """Fill a policy that was built on the `meta` device, each parameter in the dtype it has there.

    Args:
        strict: False takes a checkpoint that lacks tensors or has surplus ones, and logs which parameters are
            random then.
        base: where the tensors are that `source` does not hold, for a checkpoint of the trained weights alone.

    Returns:
        Digests, by name, of the weights that a save of the trained ones may leave to the base, as its files hold
        them; empty if nobody will ask, as hashing costs time.

    Raises:
        CheckpointError: the checkpoint is not there, broken, or not this network's; `policy` is of no use then.
    """
    started = time.perf_counter()
    wanted = dict(policy.named_parameters())
    own = index_tensors(weight_files(source, **hub))
    found = with_base(own, base, **hub)
    if base is not None:
        lent = wanted.keys() - own.keys()
    else:
        lent = {name for name, p in wanted.items() if policy.config.save_expert_only and not p.requires_grad}
    judge(source, wanted, found, strict, policy.config, **hub)
    missing = [name for name in wanted if name not in found]
    if nowhere := rounding.layers(policy).keys() & missing:
        raise MismatchedCheckpointError(
            f"{source} lacks {len(nowhere)} weights of the VLM, such as {min(nowhere)}; they would be random, which "
            "vlm_quantization does not round: leave it out"
        )
    for name in missing:
        set_parameter(policy, name, torch.empty_like(wanted[name], device=device))
    if missing:
        policy.model.initialise()
    digests = fill(policy, wanted.keys() - missing, found, device, lent)
    if base is not None:
        _check_base(base, digest_of_digests(digests), source)
    seconds = time.perf_counter() - started
    logger.info("loaded %d of %s from %s in %.1f s", len(wanted) - len(missing), _summary(wanted), source, seconds)
    return digests


def _check_base(base: Base, digest: str, source: str | Path) -> None:
    if digest != base.digest:
        raise CorruptCheckpointError(
            f"{source} holds trained weights alone, over the frozen ones of {base.id} (revision {base.revision}); but "
            f"what is missing in it has the digest {digest} there, not {base.digest}: the base has changed since, or "
            "weights were taken out"
        )


def _summary(parameters: Mapping[str, Tensor]) -> str:
    numbers = sum(p.numel() for p in parameters.values()) / 1e9
    kinds = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters.values()}))
    return f"{len(parameters)} tensors ({numbers:.2f} B parameters, {kinds})"


def load_vlm(policy: Any, source: str, device: torch.device) -> None:
    """Fill the VLM of a policy that is on the `meta` device from a PaliGemma checkpoint of transformers.

    transformers may pad the vocabulary; the rows beyond ours belong to no token and are left out.

    Raises:
        CheckpointError: the checkpoint is not there, broken, or not a PaliGemma of the preset's size.
    """
    started = time.perf_counter()
    wanted = {name: p for name, p in policy.named_parameters() if name.startswith(VLM)}
    found = index_tensors(weight_files(source), prefix=VLM)
    rows, width = wanted[EMBEDDING].shape
    embedding = found.get(EMBEDDING)
    if embedding is not None and embedding.shape[0] > rows:
        found[EMBEDDING] = embedding._replace(shape=(rows, *embedding.shape[1:]), digest=None)  # of all rows
    if report := _differences(wanted, found):
        raise MismatchedCheckpointError(
            f"vlm_path={source} is not the VLM of paligemma_variant={policy.config.paligemma_variant} for images of "
            f"{policy.config.image_size} pixels. {report}. Take PaliGemma 1 of that size in transformers' format, such "
            f"as google/paligemma-3b-pt-224 ({rows} x {width} embeddings or more)"
        )
    fill(policy, wanted, found, device)
    logger.info("the VLM is %s's (%d tensors, %.1f s)", source, len(wanted), time.perf_counter() - started)


def fill(
    policy: nn.Module,
    names: Iterable[str],
    found: Mapping[str, Stored],
    device: torch.device,
    lent: Container[str] = (),
) -> dict[str, str]:
    """Put these parameters of a policy on the `meta` device into memory, with what the files hold.

    Returns:
        Digests of those in `lent`, as the files hold them.

    Raises:
        CorruptCheckpointError: one is not what was written, or not finite.
    """
    parameters, rounded = dict(policy.named_parameters()), rounding.layers(policy)
    names = set(names)

    def memory(name: str) -> Tensor:
        return streaming.empty(parameters[name].shape, parameters[name].dtype, device)

    def read_and_round(name: str) -> str:  # a few at a time: all of them unrounded are never in memory
        weight = memory(name)
        digest = _read(weight, found[name], name if name in lent else None)
        rounded[name].put(weight)
        return digest

    targets = {name: memory(name) for name in names - rounded.keys()}
    digests = read_tensors(targets, found, lent)
    for name, tensor in targets.items():
        set_parameter(policy, name, tensor)
    last = sorted(names & rounded.keys())
    of_rounded = zip(last, streaming.in_threads(read_and_round, last), strict=True)
    return digests | {name: digest for name, digest in of_rounded if name in lent}


def read_tensors(
    targets: Mapping[str, Tensor], found: Mapping[str, Stored], lent: Container[str] = ()
) -> dict[str, str]:
    """Read tensors from files into memory that is there already, each judged as it is read; otherwise as `fill`."""

    def read(name: str) -> str:
        return _read(targets[name], found[name], name if name in lent else None)

    names = sorted(targets, key=lambda name: -targets[name].numel())  # the largest last would leave one thread alone
    digests = dict(zip(names, streaming.in_threads(read, names), strict=True))
    return {name: digest for name, digest in digests.items() if name in lent}


def _read(target: Tensor, stored: Stored, digest_as: str | None) -> str:
    """Read one tensor, and return its digest under the name `digest_as`, if there is one."""
    dtype = streaming.DTYPES[stored.dtype]
    checked, asked = (streaming.hash_of(name, dtype, stored.shape) for name in (stored.name, digest_as or ""))
    hashes = [checked] * (stored.digest is not None) + [asked] * (digest_as is not None)
    try:
        finite = streaming.read(target, stored.file, stored.offset, dtype, hashes)
    except OSError as error:
        raise CorruptCheckpointError(
            f"{stored.file} cannot be read where {stored.name} is: {error}. Copy or download it again"
        ) from error
    if stored.digest not in (None, checked.hexdigest()):
        raise CorruptCheckpointError(
            f"{stored.name} in {stored.file} is not what was written (its digest differs): copy or download it again"
        )
    if not finite:
        raise CorruptCheckpointError(f"{stored.name} in {stored.file} holds NaN or infinity: training had diverged")
    return asked.hexdigest()


def _digests(opened: Any) -> dict[str, str]:
    try:
        digests = json.loads((opened.metadata() or {}).get(DIGESTS, "{}"))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"the digests that the file carries are unreadable ({error})") from error
    if not isinstance(digests, dict):
        raise CorruptCheckpointError("the digests that the file carries are unreadable (no object)")
    return digests


def _differences(wanted: Mapping[str, Tensor], found: dict[str, Stored]) -> str:
    """What is missing, unexpected, or of another shape or kind; empty if nothing is."""
    misfits = [
        f"{s.name} is {s.dtype} {s.shape}, expected {tuple(wanted[name].shape)} of a floating-point type"
        for name, s in found.items()
        if name in wanted and not _fits(s, wanted[name])
    ]
    parts = []
    for title, names in (
        ("missing", [name for name in wanted if name not in found]),
        ("unexpected", [stored.name for name, stored in found.items() if name not in wanted]),
        ("misfits", misfits),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"{len(names)} {title}: {', '.join(names[:5])}{more}")
    return "; ".join(parts)


def _fits(stored: Stored, wanted: Tensor) -> bool:
    return stored.shape == tuple(wanted.shape) and stored.dtype in streaming.DTYPES


def judge(
    source: str | Path,
    wanted: Mapping[str, Tensor],
    found: dict[str, Stored],
    strict: bool,
    config: PI0Config | None = None,
    **hub: Any,
) -> None:
    """Compare names, shapes and kinds before a weight is read.

    Args:
        config: the options that were asked for, where they may be others than the checkpoint's.

    Raises:
        CheckpointError: they are not this network's. What is missing or surplus is forgiven unless `strict`.
    """
    if not (differences := _differences(wanted, found)):
        return
    report = f"the weights of {source} do not fit the network. {differences}"
    surplus = [stored.name for name, stored in found.items() if name not in wanted]
    if any("time_mlp_in" in name and "action_" not in name for name in surplus):
        raise WrongPolicyError(f"{report}. These are weights of π₀.₅: use --policy.type=pi05")
    if not any("gemma_expert" in name for name in found):
        raise WrongPolicyError(f"{report}. There is no action expert: these are weights of a VLM, or of π₀-FAST")
    if strict or not all(_fits(s, wanted[name]) for name, s in found.items() if name in wanted):
        raise MismatchedCheckpointError(
            f"{report}. {_advice(source, config, **hub)}; strict=False takes what fits and leaves the rest random"
        )
    logger.warning("%s. strict=False: the missing ones are random", report)


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by one of another device or dtype that is trained if the old one was."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(value, requires_grad=getattr(module, leaf).requires_grad))


def published_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A policy's tensors as published checkpoints have them, complete in the built-in's eyes.

    The embedding goes under the name of the VLM's head, from which the built-in fills both; the expert's head,
    which nothing reads and the built-in nevertheless demands, is zeros.
    """
    state = dict(state)
    embedding = state.pop(EMBEDDING)
    width = len(state[NETWORK + "gemma_expert.model.norm.weight"])
    zeros = embedding.new_zeros(()).expand(len(embedding), width)  # one number: they take no memory
    return state | {LM_HEAD: embedding, EXPERT_HEAD: zeros}


def save(folder: Path, configs: dict[str, dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint so that a crash at any moment leaves the old one or the new one.

    Everything is written beside the old files first. The new config.json is the commit: from the moment it has its
    name, the rest is finished by whoever looks at the folder next (`finish_interrupted_save`).

    Args:
        configs: content of config.json and of the other JSON files, by file name.
        tensors: what goes into model.safetensors, by stored name.
    """
    finish_interrupted_save(folder)  # one that was committed is the old checkpoint
    texts = {name: json.dumps(content, indent=4) + "\n" for name, content in configs.items()}
    metadata = {"format": "pt", CONFIG_DIGEST: xxhash.xxh3_64_hexdigest(texts[CONFIG_NAME].encode())}
    for name in (*texts, SAFETENSORS_SINGLE_FILE):
        (folder / (name + NEW)).unlink(missing_ok=True)  # of an earlier save that was cut off
    for name, text in texts.items():
        _write_whole(folder / (name + NEW), lambda part, text=text: part.write_text(text))
    _write_whole(
        folder / (SAFETENSORS_SINGLE_FILE + NEW), lambda part: streaming.write(tensors, part, metadata, DIGESTS)
    )
    (folder / (CONFIG_NAME + NEW)).replace(folder / CONFIG_NAME)
    finish_interrupted_save(folder)


NEW = ".new"


def _write_whole(file: Path, write: Any) -> None:
    """`write` to a path and give it its name when it is whole.

    Nothing is forced to the disk, which would double the time: a file that a power cut tears is found by its digests.
    """
    part = file.with_name(file.name + ".part")
    write(part)
    part.replace(file)


def finish_interrupted_save(folder: Path) -> None:
    """Put the files of a committed save in their places; leave those of one that was not committed."""
    weights = folder / (SAFETENSORS_SINGLE_FILE + NEW)
    config = folder / CONFIG_NAME
    if not (weights.exists() and config.exists()):
        return
    try:
        with _opened(weights) as opened:
            written_with = (opened.metadata() or {}).get(CONFIG_DIGEST)
    except FileNotFoundError:  # another process was faster
        return
    if written_with == xxhash.xxh3_64_hexdigest(config.read_bytes()):
        for file in [*folder.glob("*.json" + NEW), weights]:
            with contextlib.suppress(FileNotFoundError):  # another process may be doing the same
                file.replace(file.with_suffix(""))


def digest_of_digests(digests: dict[str, str]) -> str:
    """One digest of many tensors, independent of their order."""
    return xxhash.xxh3_64_hexdigest(json.dumps(digests, sort_keys=True).encode())
