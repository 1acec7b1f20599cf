"""Rank maps: the ranks of every layer, as ``ranks.yaml`` holds them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from starkv_core.artifacts import SCHEMA, check_schema
from starkv_core.errors import UserError
from starkv_core.models.spec import ModelSpec
from triton_ops.latent_attention import row_width


@dataclass(frozen=True)
class LayerRanks:
    """Ranks of one compressed layer.

    Attributes:
        keys: one per group of key heads; head-wise decomposition has one per head.
        values: one per group of value heads; joint decomposition has a single one.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]

    @property
    def total(self) -> int:
        """Latents per token, without the padding of rows: nominal."""
        return sum(self.keys) + sum(self.values)

    @property
    def stored(self) -> int:
        """Numbers stored per token: a row of keys and one of values, padding included."""
        return row_width(sum(self.keys)) + row_width(sum(self.values))


@dataclass(frozen=True)
class RankMap:
    """Ranks per layer; None marks a layer that stays dense."""

    layers: tuple[LayerRanks | None, ...]

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that tell this map from others."""
        text = json.dumps(self.to_dict()["layers"], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def to_dict(self) -> dict[str, Any]:
        """Plain form for YAML."""
        return {
            "schema": SCHEMA,
            "layers": [
                "dense"
                if layer is None
                else {"keys": list(layer.keys), "values": _plain(layer.values)}
                for layer in self.layers
            ],
        }

    @staticmethod
    def from_dict(data: Any, where: str) -> RankMap:
        """Read the plain form.

        Raises:
            UserError: with every fault listed.
        """
        if not isinstance(data, dict) or not isinstance(data.get("layers"), list):
            raise UserError(f"{where}: not a rank map (expected keys schema and layers)")
        check_schema(data.get("schema"), where)
        faults: list[str] = []
        layers: list[LayerRanks | None] = []
        for i, entry in enumerate(data["layers"]):
            if entry == "dense":
                layers.append(None)
            elif isinstance(entry, dict) and set(entry) == {"keys", "values"}:
                keys, values = _ranks(entry["keys"]), _ranks(entry["values"])
                if keys and values:
                    layers.append(LayerRanks(keys, values))
                else:
                    name = "values" if keys else "keys"
                    faults.append(f"layer {i}: {name} must be whole numbers from 1")
            else:
                faults.append(f"layer {i}: expected `dense` or keys and values")
        if faults:
            raise UserError.many(f"{where}: malformed rank map", faults)
        return RankMap(tuple(layers))

    def check(self, spec: ModelSpec, where: str) -> None:
        """Refuse a map that does not fit the model.

        Raises:
            UserError: with every fault listed.
        """
        if len(self.layers) != spec.n_layers:
            raise UserError(
                f"{where}: {len(self.layers)} layers, but the model has {spec.n_layers}"
            )
        faults = []
        for i, layer in enumerate(self.layers):
            if layer is None:
                continue
            if i in spec.dense_reasons:
                faults.append(f"layer {i} must stay dense ({spec.dense_reasons[i]})")
            for name, ranks in (("key", layer.keys), ("value", layer.values)):
                if spec.n_kv_heads % len(ranks):
                    faults.append(
                        f"layer {i}: {len(ranks)} {name} ranks do not divide {spec.n_kv_heads} "
                        f"heads; expected {_divisors(spec.n_kv_heads)}"
                    )
                    continue
                full = min(spec.hidden, spec.head_dim * (spec.n_kv_heads // len(ranks)))
                if max(ranks) > full:
                    faults.append(f"layer {i}: {name} rank {max(ranks)} is above {full}")
        if faults:
            raise UserError.many(f"{where}: rank map does not fit the model", faults)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _ranks(value: Any) -> tuple[int, ...]:
    found = value if isinstance(value, list) else [value]
    return tuple(found) if all(map(_is_rank, found)) else ()


def _divisors(heads: int) -> str:
    """How many ranks a layer's keys or values may have: one for each group of heads."""
    found = [str(n) for n in range(1, heads + 1) if heads % n == 0]
    return " or ".join(filter(None, (", ".join(found[:-1]), found[-1])))


def _plain(ranks: tuple[int, ...]) -> int | list[int]:
    return ranks[0] if len(ranks) == 1 else list(ranks)
