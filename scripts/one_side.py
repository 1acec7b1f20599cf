"""What a start of the keys (or values) alone costs at one rank everywhere: KL and perplexity.

The cheapest probe there is: statistics once, then for each variant one decomposition, put in place
of the weights of all layers, and one pass over a text. All else is equal, so variants compare; what
allocation, training and codes add is not in it. A JSON object a line.

    python scripts/one_side.py keys --rank 20 keys=query-aware keys=attended
    python scripts/one_side.py keys --rank 20 keys=query-aware keys=attended --model MODEL \\
        --calibration my.txt --sequences 8 --length 1024 --text wiki.test.raw --windows 3
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from starkv_core.calibrate.distill import distillation_loss
from starkv_core.calibrate.layer_start import approximated
from starkv_core.calibrate.start import decompose_layer
from starkv_core.data.corpus import documents
from starkv_core.data.packing import pack
from starkv_core.eval.perplexity import cut_windows
from starkv_core.eval.text import BUILTIN, read_eval_text
from starkv_core.models.load import LoadedModel, load
from starkv_core.recipe import load_recipe
from starkv_core.statistics import gather_statistics


@torch.no_grad()
def costs(loaded: LoadedModel, rows: torch.Tensor, exact: list[torch.Tensor]) -> dict[str, float]:
    """KL from the dense model and perplexity of ``loaded`` as it is.

    Args:
        rows: int64 ``[N, L]``.
        exact: last hidden states of the dense model, a ``[1, L, d]`` for each row; filled if empty.
    """
    head = loaded.model.get_output_embeddings().weight
    kl, nll, dense = 0.0, 0.0, not exact
    for i, row in enumerate(rows.to(loaded.device)):
        hidden = loaded.model.model(row[None], use_cache=False)[0]
        if dense:
            exact.append(hidden)
        kl += float(distillation_loss(hidden, exact[i], head))
        logits = (hidden[0, :-1] @ head.T).float()
        nll += float(torch.nn.functional.cross_entropy(logits, row[1:]))
    return {"kl": kl / len(rows), "perplexity": math.exp(nll / len(rows))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", choices=("keys", "values"))
    parser.add_argument("variants", nargs="+", help="options of start, joined by commas")
    parser.add_argument("--rank", type=int, required=True, help="of every factorisation")
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--calibration", default=BUILTIN)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--text", default=BUILTIN)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    given = parser.parse_args(arguments)
    loaded = load(given.model, device=given.device, dtype=given.dtype)
    layers = list(range(loaded.spec.n_layers))
    tokens = pack(
        loaded.tokenizer, documents(given.calibration), given.length, given.sequences, seed=0
    )
    text = read_eval_text(loaded.tokenizer, given.text)
    rows = cut_windows(loaded.tokenizer, text, given.window, given.windows).ids
    stats = gather_statistics(loaded, tokens, layers, mixed=given.side == "values")
    other = "values" if given.side == "keys" else "keys"
    exact: list[torch.Tensor] = []
    dense = costs(loaded, rows, exact)
    attentions: Any = loaded.family.attentions(loaded.model)
    for variant in given.variants:
        options = [f"start.{other}=weights", *(f"start.{o}" for o in variant.split(","))]
        start = load_recipe("tiny", options).start
        with ExitStack() as held:
            for i in layers:
                made = decompose_layer(loaded, i, start, stats[i])
                linear, blocks, mean, order = made.sides(attentions[i])[given.side == "values"]
                ranks = [given.rank] * len(blocks)
                held.enter_context(approximated(linear, blocks, ranks, mean, order))
            found = costs(loaded, rows, exact)
        found["increase"] = found["perplexity"] / dense["perplexity"] - 1
        about = {"side": given.side, "rank": given.rank, "start": variant, **found}
        about |= {"dense_perplexity": dense["perplexity"], "tokens": rows.numel()}
        sys.stdout.write(json.dumps(about) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
