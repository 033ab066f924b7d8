"""From settings to an engine that is ready to step: device, model, cache, loop.

Start at `build_engine`. A loader (`EngineConfig.loader`) turns settings into a `LoadedReplica`; the
default one reads a Hugging Face checkpoint, tests have their own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec

from mxn.engine.config import KV_FRACTION, KV_FRACTION_HOST, EngineConfig
from mxn.engine.detokenize import byte_fallback_ids
from mxn.engine.kvstore import PagePlan, allocate, page_bytes, plan_pages
from mxn.engine.protocol import ModelInfo
from mxn.errors import CapacityError
from mxn.units import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from mxn.chips.chip import Device
    from mxn.engine.core import EngineCore
    from mxn.engine.draft import MtpDrafter, NgramDrafter
    from mxn.engine.encoder import EncoderCore
    from mxn.kernels.registry import Ops
    from mxn.models.base import CausalLM, TextEncoder
    from mxn.models.load import LoadedModel

log = logging.getLogger("mxn.engine")

SAMPLER_OPS = ("choose", "token_logprobs")

Report = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedReplica:
    """What a loader returns: a model on a device and the tokenizer that belongs to it."""

    loaded: LoadedModel
    tokenizer: Any  # mxn.models.tokenizer.Tokenizer, or one with the same `decode`
    chip: str
    device: torch.device
    device_id: str = ""  # as `mxn chips` prints it, such as cpu:0
    free_bytes: int | None = None  # memory left on the device for the cache; None: it does not tell
    is_host_memory: bool = False  # the device computes in the machine's main memory
    ops: Any = None  # the bound operators, for the sampler; None: bind here

    @property
    def decoder(self) -> CausalLM:
        """The model, when `loaded.kind` says that it is one."""
        return cast("CausalLM", self.loaded.model)

    @property
    def encoder(self) -> TextEncoder:
        """The model, when `loaded.kind` says that it embeds or scores."""
        return cast("TextEncoder", self.loaded.model)


def build_engine(config: EngineConfig, report: Report) -> EngineCore | EncoderCore:
    """Load the replica that `config` describes and return its loop.

    Raises: UserError subclasses with a hint when model, device and settings do not fit together.
    """
    from mxn.engine.process import find_loader
    from mxn.engine.trim import trim_beside

    started_s = time.perf_counter()
    replica = find_loader(config.loader)(config, report)
    if replica.loaded.kind == "decoder":
        engine = _decoder(config, replica, report)
    else:
        engine = _encoder(config, replica)
    engine.info = msgspec.structs.replace(engine.info, load_s=time.perf_counter() - started_s)
    trim_beside()
    return engine


def load_checkpoint(config: EngineConfig, report: Report) -> LoadedReplica:
    """Load the Hugging Face checkpoint `config.model` onto `config.device`."""
    import torch

    from mxn.chips import find_device, free_memory
    from mxn.kernels.native import formats
    from mxn.models.base import OwnsCache
    from mxn.models.hub import resolve
    from mxn.models.load import load_model
    from mxn.models.tokenizer import Tokenizer

    directory = resolve(config.model)
    device = find_device(config.device)
    dtype, reason = dtype_for(directory, device, config.dtype)
    format = None
    if config.weights != "plain":
        format = formats.parse(config.weights, config.kv)
        log.info("%s on %s: %s", directory.name, device.id, format)
    else:
        log.info("%s on %s in %s: %s", directory.name, device.id, dtype, reason)
    with ThreadPoolExecutor(1, "tokenizer") as beside:
        # A large vocabulary takes as long to read as a packed model does, mostly without the GIL.
        tokenizer = beside.submit(Tokenizer.load, directory)
        loaded = load_model(
            directory,
            device,
            dtype,
            on_progress=lambda done, total: report("weights", done, total),
            allow_fallback=config.allow_fallback,
            prefer_fallback=config.prefer_fallback,
            max_context=config.max_context,
            format=format,
            cache=None if config.kv == "auto" else config.kv,
            num_threads=config.num_threads,
            prediction=config.speculation == "mtp",
        )
    if isinstance(loaded.model, OwnsCache):
        # The step runs on threads of its own: torch's, spinning behind an operator of the sampler,
        # would take their cores (24 ms became 43 ms for 8 sequences at 0.6B).
        torch.set_num_threads(1)
    torch_device = torch.device(device.torch_device)
    return LoadedReplica(
        loaded=loaded,
        tokenizer=tokenizer.result(),
        chip=device.chip,
        device=torch_device,
        device_id=device.id,
        free_bytes=free_memory(device),
        is_host_memory=torch_device.type == "cpu",
    )


def dtype_for(directory: Path, device: Device, asked: str) -> tuple[str, str]:
    """Return the dtype to compute a checkpoint in on `device`, and why it is that one."""
    from mxn.chips import default_dtype
    from mxn.models.load import checkpoint_dtype
    from mxn.models.storage import read_config

    if asked != "auto":
        return asked, "asked for"
    return default_dtype(device, checkpoint_dtype(read_config(directory)))


def context_of(config: EngineConfig, model_context: int, page_bytes: int, fits_tokens: int) -> int:
    """Return the context to serve: what was asked for, or what the model has and memory allows."""
    if config.max_context is not None:
        if config.max_context > model_context:
            raise CapacityError(
                f"max_context {config.max_context} is more than the model's {model_context}",
                hint=f"--max-context {model_context}",
            )
        return config.max_context
    if fits_tokens < model_context and fits_tokens > 0:
        log.warning(
            "context cut from %d to %d tokens: %s of cache is all there is memory for",
            model_context,
            fits_tokens,
            format_bytes(fits_tokens // config.page_tokens * page_bytes),
        )
        return fits_tokens
    return model_context


def _plan(config: EngineConfig, replica: LoadedReplica, model: CausalLM) -> tuple[PagePlan, int]:
    """Return the page pool and the context it can serve."""
    size = page_bytes(model, config.page_tokens)
    available = config.kv_bytes
    if available is None and replica.free_bytes is not None:
        default = KV_FRACTION_HOST if replica.is_host_memory else KV_FRACTION
        available = int(replica.free_bytes * (config.kv_fraction or default))
    model_context = replica.loaded.max_context
    fits = model_context if available is None else available // size * config.page_tokens
    max_context = context_of(config, model_context, size, fits)
    plan = plan_pages(
        page_bytes=size,
        page_tokens=config.page_tokens,
        max_sequences=config.max_sequences,
        max_context=max_context,
        available_bytes=available,
        is_given=config.kv_bytes is not None,
        device=str(replica.device),
    )
    return plan, max_context


def _decoder(config: EngineConfig, replica: LoadedReplica, report: Report) -> EngineCore:
    from mxn.engine.adapters import Adapters
    from mxn.engine.core import EngineCore
    from mxn.engine.draft import MtpDrafter
    from mxn.engine.grammar import Grammars
    from mxn.engine.graphs import capture_decode
    from mxn.engine.kvcache import PageTable
    from mxn.engine.mtp import PredictingDecoder
    from mxn.engine.plan import SchedulerConfig
    from mxn.engine.runner import Runner
    from mxn.engine.sampler import Sampler
    from mxn.engine.scheduler import Scheduler

    model = replica.decoder
    if config.speculation == "mtp":
        model = PredictingDecoder.wrap(model)
    drafter = _drafter(config)
    plan, max_context = _plan(config, replica, model)
    report("cache", 0, plan.total_bytes)
    # One page more than the table deals out: what pads a captured step writes there.
    wants_graphs = _wants_graphs(config, replica.device)
    cache = allocate(model, num_pages=plan.num_pages + wants_graphs, page_tokens=config.page_tokens)
    report("cache", plan.total_bytes, plan.total_bytes)
    log.info(
        "cache: %d pages of %d tokens, %s, limited by %s",
        plan.num_pages, config.page_tokens, format_bytes(plan.total_bytes), plan.limited_by,
    )  # fmt: skip
    vocab_size = min(model.vocab_size, getattr(replica.tokenizer, "vocab_size", model.vocab_size))
    # Rows of the matrix that the tokenizer has no token for are padding: nobody may name them.
    info = msgspec.structs.replace(
        _info(config, replica, max_context=max_context),
        vocab_size=vocab_size,
        eos_ids=tuple(token for token in replica.loaded.eos_ids if token < vocab_size),
    )
    adapters = Adapters(replica.decoder, max_adapters=config.max_adapters)
    if wants_graphs:
        model, note = capture_decode(
            model, cache, config.max_sequences, page_tokens=config.page_tokens,
            max_context=max_context, is_adapted=lambda: adapters.is_applied,
        )  # fmt: skip
        info = msgspec.structs.replace(info, kernels=info.kernels | {"graphs": note})
    runner = Runner(
        model,
        cache,
        Sampler(replica.ops or _bind_ops(replica), replica.device, vocab_size),
        page_tokens=config.page_tokens,
        max_sequences=config.max_sequences,
        max_pages=-(-max_context // config.page_tokens),
        adapters=adapters,
        drafter=drafter if isinstance(drafter, MtpDrafter) else None,
    )
    scheduler = Scheduler(
        SchedulerConfig(
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
            max_context=max_context,
            max_draft_rows=config.max_draft_rows,
        ),
        PageTable(plan.num_pages, config.page_tokens, prefix_caching=config.prefix_caching),
        drafter,
    )
    return EngineCore(
        msgspec.structs.replace(
            info, kv_pages_total=plan.num_pages, page_tokens=config.page_tokens
        ),
        scheduler,
        runner,
        replica.tokenizer,
        byte_ids=_byte_ids(replica.tokenizer),
        max_waiting=config.max_waiting,
        adapters=adapters,
        grammars=Grammars(replica.tokenizer, info.vocab_size, info.eos_ids),
    )


def _wants_graphs(config: EngineConfig, device: torch.device) -> bool:
    """Whether decode steps are to be replayed; a prediction layer needs more than their logits."""
    return config.cuda_graphs and device.type == "cuda" and config.speculation != "mtp"


def _drafter(config: EngineConfig) -> NgramDrafter | MtpDrafter | None:
    """Return what guesses tokens."""
    from mxn.engine.draft import MtpDrafter, NgramDrafter

    if config.speculation == "off":
        return None
    if config.speculation == "mtp":
        return MtpDrafter(config.num_draft_tokens, config.max_draft_rows)
    return NgramDrafter(config.num_draft_tokens)


def _bind_ops(replica: LoadedReplica) -> Ops:
    """The sampler's operators; logits are float32 whatever the model computes in."""
    import torch

    from mxn.kernels.registry import Ops

    return Ops.bind(replica.device, replica.chip, torch.float32, only=SAMPLER_OPS)


def _byte_ids(tokenizer: Any) -> frozenset[int]:
    raw = getattr(tokenizer, "raw", None)
    if raw is None or raw.token_to_id("<0x00>") is None:
        return frozenset()
    return byte_fallback_ids(raw.get_vocab(with_added_tokens=True))


def _encoder(config: EngineConfig, replica: LoadedReplica) -> EncoderCore:
    from mxn.engine.encoder import EncoderCore

    info = _info(config, replica, max_context=replica.loaded.max_context)
    return EncoderCore(replica.encoder, info, max_batch_tokens=config.max_batch_tokens)


def _info(config: EngineConfig, replica: LoadedReplica, *, max_context: int) -> ModelInfo:
    loaded = replica.loaded
    return ModelInfo(
        kind=loaded.kind,
        family=loaded.family,
        path=config.model,
        device=replica.device_id or str(replica.device),
        chip=replica.chip,
        dtype=loaded.dtype,
        max_context=max_context,
        vocab_size=loaded.model.vocab_size,
        num_parameters=loaded.num_parameters,
        eos_ids=loaded.eos_ids,
        native=loaded.is_native,
        kernels=loaded.kernels,
    )
