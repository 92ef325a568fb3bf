"""Quantities recorded along the chains: functions of the model, not of the factors' gauge.

LoRA's factors are defined only up to (BG, G⁻¹A), so R-hat of raw parameters misleads. Recorded
are log-probabilities on a fixed probe set, the log-posterior (its likelihood on a fixed subset of
the training set), ‖ΔW_l‖_F of every layer, and fixed random projections of ΔW. Of the parameters
themselves the norm and a few coordinates are recorded too, under names that begin with `RAW`: to be
shown, never to be judged by.

Shapes: M chains, P probe examples, R rank, D widths, d parameters of a chain.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.models.chain_lora import ChainLora
from bayesian_lora.objective import Objective
from bayesian_lora.posterior import PriorGroup, energy
from bayesian_lora.predict import predict_logits
from bayesian_lora.utils.lora_params import chain_norm

PROJECTIONS = 4
RAW = "raw["
"""How the names of raw parameters begin."""
COORDINATES = 4


class Traces:
    """Rows of named quantities, each (M,); `arrays()` gives them as (M, rows).

    Args:
        objective: the likelihood, whose training set's size is N.
        groups: the tensors under their priors.
        probe: examples (held out, if there are any) whose log-probabilities are recorded.
        subset: a fixed part of the training set for the log-posterior.
        seed: of the random projections and of the coordinates.
    """

    def __init__(
        self,
        objective: Objective,
        groups: list[PriorGroup],
        probe: TokenisedSet,
        subset: TokenisedSet,
        seed: int,
    ) -> None:
        self.objective, self.groups = objective, groups
        self.probe, self.subset = probe, subset
        generator = torch.Generator().manual_seed(seed)
        self.directions = {
            name: (
                _directions(layer.base.out_features, generator),
                _directions(layer.base.in_features, generator),
            )
            for name, layer in objective.model.lora_layers().items()
        }
        self.coordinates = _coordinates(objective.model.chain_parameters(), seed)
        self.rows: list[dict[str, np.ndarray]] = []

    def record(self) -> dict[str, np.ndarray]:
        """Measure the chains as they stand and append the row. Draws no random number."""
        self.rows.append(self.measure())
        return self.rows[-1]

    @torch.no_grad()
    def measure(self) -> dict[str, np.ndarray]:
        """Every quantity now, each (M,) float64."""
        row = self._probe_row()
        num_examples = len(self.objective.data)
        u = energy(self.objective.mean_nll(self.subset), num_examples, _on_cpu(self.groups))
        row["log_posterior"] = -u.numpy()
        projections = torch.zeros(self.objective.model.num_chains, PROJECTIONS, dtype=torch.float64)
        for name, layer in self.objective.model.lora_layers().items():
            row[f"delta_w_norm[{name}]"] = delta_w_norm(layer).double().cpu().numpy()
            projections += self._project(name, layer)
        for j, column in enumerate(projections.T):
            row[f"delta_w_projection[{j}]"] = column.numpy()
        return row | self._raw_row()

    def _probe_row(self) -> dict[str, np.ndarray]:
        outputs = torch.from_numpy(predict_logits(self.objective.model, self.probe)).double()
        if self.objective.likelihood == "gaussian":
            return {f"probe_mean[{i}]": x.numpy() for i, x in enumerate(outputs[..., 0].T)}
        labels = self.probe.labels.expand(outputs.shape[0], -1)
        values = outputs.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        return {f"probe_logprob[{i}]": x.numpy() for i, x in enumerate(values.T)}

    def _raw_row(self) -> dict[str, np.ndarray]:
        """‖θ‖ and θ_i of the fixed coordinates: depend on the gauge, as R-hat of them does."""
        state = self.objective.model.chain_parameters()
        row = {f"{RAW}norm]": chain_norm(state)}
        for j, (name, i) in enumerate(self.coordinates):
            row[f"{RAW}{j}]"] = state[name].flatten(1)[:, i]
        # A copy: a coordinate is a view of the parameters, which move on.
        return {name: x.detach().cpu().double().numpy().copy() for name, x in row.items()}

    def _project(self, name: str, layer: ChainLora) -> Tensor:
        """uᵀ ΔW v for each pair of fixed unit vectors, (M, PROJECTIONS)."""
        left, right = (v.to(layer.lora_A) for v in self.directions[name])
        product = (left @ layer.lora_B) * (layer.lora_A @ right.T).mT
        return (layer.scaling * product.sum(-1)).double().cpu()

    def arrays(self) -> dict[str, np.ndarray]:
        """The rows held, each quantity (M, rows)."""
        rows = self.rows
        return (
            {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}
            if rows
            else {}
        )

    def take(self) -> dict[str, np.ndarray]:
        """`arrays`, which are then no longer held."""
        arrays, self.rows = self.arrays(), []
        return arrays


def delta_w_norm(layer: ChainLora) -> Tensor:
    """‖ΔW‖_F of every chain (M,), from the factors: ‖BA‖² = tr((BᵀB)(AAᵀ))."""
    b, a = layer.lora_B, layer.lora_A
    square = ((b.mT @ b) * (a @ a.mT)).sum((1, 2))
    return layer.scaling * square.clamp_min(0).sqrt()


def _coordinates(state: Mapping[str, Tensor], seed: int) -> list[tuple[str, int]]:
    """(name, place in the flattened tensor) of different parameters drawn from all d."""
    sizes = [tensor[0].numel() for tensor in state.values()]
    ends = np.cumsum(sizes)
    drawn = np.random.default_rng(seed).choice(
        int(ends[-1]), min(COORDINATES, int(ends[-1])), replace=False
    )
    found = []
    for i in drawn.tolist():
        k = int(np.searchsorted(ends, i, side="right"))
        found.append((list(state)[k], i - int(ends[k]) + sizes[k]))
    return found


def _directions(width: int, generator: torch.Generator) -> Tensor:
    vectors = torch.randn(PROJECTIONS, width, generator=generator)
    return vectors / vectors.norm(dim=1, keepdim=True)


def _on_cpu(groups: list[PriorGroup]) -> list[PriorGroup]:
    return [PriorGroup(tuple(t.detach().cpu() for t in g.tensors), g.std) for g in groups]
