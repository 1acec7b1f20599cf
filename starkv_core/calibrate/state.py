"""What a calibration keeps on disk so that it can be killed and resumed at any moment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from starkv_core.artifacts import read_safetensors, save_safetensors_atomic
from starkv_core.errors import UserError
from starkv_core.factors import TrainedLayer, layer_counts, layer_tensors, layers_from
from starkv_core.models.load import LoadedModel

START = "calibration/start.safetensors"
STATE = "calibration/state.safetensors"


def save_start(run_dir: Path, layers: Mapping[int, TrainedLayer]) -> None:
    """Keep the start, so that a resumed run need not gather statistics again."""
    save_safetensors_atomic(
        run_dir / START, layer_tensors(layers), {"counts": layer_counts(layers)}
    )


def load_start(run_dir: Path, loaded: LoadedModel) -> dict[int, TrainedLayer] | None:
    """The start kept by an earlier attempt, or None."""
    path = run_dir / START
    if not path.is_file():
        return None
    tensors, metadata = read_safetensors(path)
    return layers_from(loaded, tensors, metadata.get("counts", "{}"), str(path))


def save_state(
    run_dir: Path,
    student: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scalars: dict[str, Any],
) -> None:
    """Parameters, the optimiser's moments and scalars such as the step, in one atomic file."""
    tensors = {f"student.{k}": v.detach() for k, v in student.state_dict().items()}
    for i, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{i}.{name}"] = value
    save_safetensors_atomic(run_dir / STATE, tensors, {"scalars": json.dumps(scalars)})


def load_state(
    run_dir: Path, student: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Put a saved state back; returns its scalars, or None when there is no state."""
    path = run_dir / STATE
    if not path.is_file():
        return None
    tensors, metadata = read_safetensors(path)
    own = {k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")}
    try:
        student.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit this run: {str(error).splitlines()[0]}") from error
    for i, parameter in enumerate(_parameters(optimizer)):
        prefix = f"optimizer.{i}."
        found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if found:
            optimizer.state[parameter] = {
                k: v if k == "step" and not _fused(optimizer) else v.to(parameter.device)
                for k, v in found.items()
            }
    scalars: dict[str, Any] = json.loads(metadata["scalars"])
    return scalars


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))
