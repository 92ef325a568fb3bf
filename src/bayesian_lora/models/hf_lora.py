"""A HuggingFace classifier with chain-dimensional LoRA and head over one frozen base.

Shapes: M chains, C classes, R rank.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from bayesian_lora.errors import InputError
from bayesian_lora.models.chain_lora import ChainLinear, ChainLora, ChainModel
from bayesian_lora.models.flat_attention import store_half
from bayesian_lora.models.sources import ModelSource, load_pretrained, resolve_model
from bayesian_lora.utils.rng import chain_generators

Precision = Literal["float32", "float64", "bfloat16"]


@dataclass(frozen=True)
class LoraSpec:
    """An adapter's shape: what PEFT's `adapter_config.json` says of it."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    rslora: bool
    head_modules: tuple[str, ...]
    base: str

    @property
    def scaling(self) -> float:
        """s in ΔW = s·BA: α/R, or α/√R for rank-stabilised LoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class ModelInfo:
    """Parameter counts (of one chain) and what the model was built from."""

    source: ModelSource
    spec: LoraSpec
    lora_parameters: int
    head_parameters: int
    base_parameters: int

    @property
    def lora_ratio(self) -> float:
        return self.lora_parameters / self.base_parameters

    def lines(self) -> list[str]:
        """What the training script prints of the model."""
        return [
            "LoRA Model Info:",
            f"  - LoRA parameters: {self.lora_parameters:,}",
            f"  - Head parameters: {self.head_parameters:,}",
            f"  - Base parameters: {self.base_parameters:,}",
            f"  - LoRA ratio: {self.lora_ratio:.2%}",
        ]


class HuggingFaceLora(ChainModel):
    """`ChainModel` that knows its adapter's spec; made by `build_huggingface_lora_model`."""

    def __init__(self, base: nn.Module, info: ModelInfo) -> None:
        super().__init__(base)
        self.info = info
        self._fingerprint: str | None = None

    def use_bfloat16(self) -> None:
        """Frozen layers in bfloat16: stored so where the family is known, else by autocast."""
        self.autocast = torch.bfloat16  # of padded passes
        if self.family is None:
            return
        self._fingerprint = self.fingerprint()  # of the weights as they were
        store_half(self.base, self.family)

    def fingerprint(self) -> str:
        """sha256 over the frozen weights: an adapter belongs to exactly this base."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256()
        trained = self.chain_parameters()
        for name, tensor in sorted(self.base.state_dict().items()):
            if name not in trained:
                digest.update(name.replace(".base.", ".").encode())  # whatever the targets are
                digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()


def build_huggingface_lora_model(
    model_name: str | ModelSource,
    num_labels: int = 2,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "auto",
    rslora: bool = False,
    chains: int = 1,
    seed: int = 0,
    generators: Sequence[torch.Generator] | None = None,
    device: torch.device | str = "cpu",
    dtype: Precision = "float32",
) -> HuggingFaceLora:
    """Freeze a pretrained encoder and put M chains of LoRA factors and heads into it.

    Args:
        model_name: a hub id, a local folder, ``minilm``, or an already resolved source.
        num_labels: C outputs of the head; 1 for regression.
        rank, alpha, dropout, rslora: of LoRA (Hu et al. 2021; Kalajdzievski 2023); dropout acts
            on the LoRA inputs, and only where `ChainModel.lora_dropout` switches it on.
        target_modules: ``auto`` (query and value under the family's names) or name endings of
            linear layers such as ``["query", "key", "attention.output.dense"]``.
        chains: M; chain m's factors and head are drawn from (`seed`, m), or from `generators`.
        device, dtype: ``bfloat16`` is the frozen layers' and the products' precision; adapters,
            head, layer norms and the sums between layers stay float32.

    Returns:
        A model giving logits (M, B, C); ``.info`` has its parameter counts.

    Raises:
        InputError: a model that cannot be loaded, targets that match nothing, a head that is not
            made of linear layers, rank or chains below 1.
    """
    _check_arguments(rank, chains, num_labels, dtype)
    source = model_name if isinstance(model_name, ModelSource) else resolve_model(model_name)
    network, missing = _load_base(source, num_labels)
    network.to(device=device, dtype=torch.float64 if dtype == "float64" else torch.float32)
    network.requires_grad_(False)
    roots = _head_roots(network, missing)
    targets = _match_targets(network, source, target_modules, roots)
    spec = LoraSpec(
        rank,
        alpha,
        dropout,
        _target_names(target_modules, network),
        rslora,
        roots,
        source.public_id,
    )
    for name, linear in targets.items():
        lora = ChainLora(linear, chains, rank, spec.scaling, dropout)
        network.set_submodule(name, lora)
    base_parameters = sum(p.numel() for n, p in network.named_parameters() if _in_base(n, roots))
    _replace_head(network, roots, chains)
    info = ModelInfo(
        source,
        spec,
        lora_parameters=sum(p.numel() for p in _lora_tensors(network)) // chains,
        head_parameters=sum(p.numel() for p in _head_tensors(network)) // chains,
        base_parameters=base_parameters,
    )
    model = HuggingFaceLora(network, info)
    if dtype == "bfloat16":
        model.use_bfloat16()
    initialise(model, generators or chain_generators(seed, range(chains), "init", device))
    return model


def _check_arguments(rank: int, chains: int, num_labels: int, dtype: str) -> None:
    if rank < 1 or chains < 1 or num_labels < 1:
        raise InputError(
            f"rank={rank}, chains={chains}, num_labels={num_labels}: each must be at least 1"
        )
    if dtype not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise InputError(f"dtype={dtype!r}: choose one of {known}")


def initialise(model: ChainModel, generators: Sequence[torch.Generator]) -> None:
    """Draw every chain's factors and head anew, each from its own generator."""
    std = float(getattr(model.base.config, "initializer_range", 0.02))  # type: ignore[union-attr]
    for lora in model.lora_layers().values():
        lora.initialise(generators)
    for linear in model.head_layers().values():
        linear.initialise(generators, std)


def _load_base(source: ModelSource, num_labels: int) -> tuple[Any, list[str]]:
    import transformers

    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        network, report = load_pretrained(
            transformers.AutoModelForSequenceClassification,
            source,
            num_labels=num_labels,
            ignore_mismatched_sizes=True,  # a head for other labels is replaced anyway
            output_loading_info=True,
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
    for key, *_ in report["mismatched_keys"]:
        if key.startswith(network.base_model_prefix + "."):
            raise InputError(
                f"model.name={source.name!r}: {key} has not the shape that config.json says, so "
                "the folder is damaged; give another model"
            )
    return network, sorted(report["missing_keys"])


def _head_roots(network: Any, missing: Sequence[str]) -> tuple[str, ...]:
    """The head: all outside the encoder, and encoder layers the checkpoint has no weights for."""
    prefix = network.base_model_prefix
    roots = [
        name
        for name, child in network.named_children()
        if name != prefix and any(True for _ in child.parameters())
    ]
    for key in missing:
        module = key.rpartition(".")[0]
        if not key.startswith(prefix + ".") or module in roots:
            continue
        if not isinstance(network.get_submodule(module), nn.Linear):
            raise InputError(
                f"the checkpoint has no weights for {key}, which is neither part of the head nor "
                "a linear layer: it is incomplete, give another model"
            )
        roots.append(module)
    return tuple(roots)


def _in_base(name: str, roots: Sequence[str]) -> bool:
    is_adapter = name.endswith((".lora_A", ".lora_B"))
    return not is_adapter and not any(name.startswith(root + ".") for root in roots)


def _lora_tensors(network: nn.Module) -> list[nn.Parameter]:
    return [p for m in network.modules() if isinstance(m, ChainLora) for p in (m.lora_A, m.lora_B)]


def _head_tensors(network: nn.Module) -> list[nn.Parameter]:
    return [p for m in network.modules() if isinstance(m, ChainLinear) for p in m.parameters()]


def _target_names(wanted: str | Sequence[str], network: Any) -> tuple[str, ...]:
    if not isinstance(wanted, str):
        return tuple(wanted)
    if wanted != "auto":
        return (wanted,)
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    ours = {"distilbert": ("q_lin", "v_lin")}  # PEFT's table lacks it
    return tuple((DEFAULTS | ours).get(network.config.model_type, ("query", "value")))


def _match_targets(
    network: Any, source: ModelSource, wanted: str | Sequence[str], roots: Sequence[str]
) -> dict[str, nn.Linear]:
    """Linear layers of the encoder whose names end with a target, as PEFT matches them."""
    linear = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and _in_base(name + ".", roots)
    }
    found: dict[str, nn.Linear] = {}
    for target in _target_names(wanted, network):
        matches = {n: m for n, m in linear.items() if n == target or n.endswith("." + target)}
        if not matches:
            endings = sorted({_ending(name) for name in linear})
            raise InputError(
                f"model.lora.target_modules: {target!r} matches no linear layer of "
                f"{source.name}; there are: {', '.join(endings)}"
            )
        found |= matches
    return found


def _ending(name: str) -> str:
    """The part of a layer's name after the layer number."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name


def _replace_head(network: Any, roots: Sequence[str], chains: int) -> None:
    for root in roots:
        for name, module in list(network.get_submodule(root).named_modules(prefix=root)):
            if isinstance(module, nn.Linear):
                network.set_submodule(name, ChainLinear(module, chains))
            elif any(True for _ in module.parameters(recurse=False)):
                raise InputError(
                    f"the head's layer {name} is a {type(module).__name__}; only heads made of "
                    "linear layers carry a chain dimension"
                )
