"""RULER (arXiv 2404.06654) as lm-eval makes it: seeded, and refused where that cannot end well.

lm-eval makes 500 prompts for each length when a task is loaded. Some tasks fetch what they are made
of; the others need no network.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from starkv_core.errors import UserError

_ESSAYS = "essays from the hub and nltk's punkt_tab"
_WEB = {"ruler_qa_squad": "SQuAD from the web", "ruler_qa_hotpot": "HotpotQA from the web"}
NEEDS = {
    "niah_single_1": None,
    "niah_single_2": _ESSAYS,
    "niah_single_3": _ESSAYS,
    "niah_multikey_1": _ESSAYS,
    "niah_multikey_2": None,
    "niah_multikey_3": None,
    "niah_multiquery": _ESSAYS,
    "niah_multivalue": _ESSAYS,
    "ruler_vt": None,
    "ruler_cwe": None,
    "ruler_fwe": None,
    **_WEB,
}
"""The tasks of ``ruler`` and what each fetches."""
DEFAULT_LENGTHS = (4096,)  # lm-eval's

_SEEDS = (0, 1234)  # lm-eval's, of random and numpy
_OWN_EXAMPLE = 500  # tokens that lm-eval gives variable tracking's solved example
_LEAST = {  # the steps in which lm-eval grows a prompt, and the tokens it leaves for the answer
    "ruler_vt": (10, 30),
    "ruler_cwe": (10, 120),
}
_SLACK = 1.05  # prompts of the same size differ by a few tokens


def needs_nothing(name: str) -> bool:
    """Whether a task is one of RULER's that fetch nothing."""
    return name in NEEDS and NEEDS[name] is None


def instead(names: Iterable[str]) -> list[str]:
    """A line on the tasks that fetch nothing, for an error about some that do; else none."""
    if not any(map(NEEDS.get, names)):
        return []
    return ["these need no network: " + ",".join(filter(needs_nothing, NEEDS))]


@contextmanager
def making(name: str, path: Path, *, offline: bool) -> Iterator[None]:
    """Make a task's prompts alike in every run, as lm-eval's own command does, without its prints.

    Args:
        name: of the task.
        path: of its definition.
        offline: have nothing fetched; lm-eval asks nltk to, for tasks that do not need it too.

    Raises:
        OSError: what the task needs is not here.
    """
    if offline and not _kept(name):
        raise OSError(f"{NEEDS[name]}: not kept on this machine")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), _nltk(offline):
        from lm_eval.tasks._yaml_loader import load_yaml

        load_yaml(path)  # imports all that it takes, which may draw numbers of its own
        state, numpy_state = random.getstate(), np.random.get_state()
        random.seed(_SEEDS[0])
        np.random.seed(_SEEDS[1])
        try:
            yield
        except LookupError as error:
            if "punkt" not in str(error):
                raise
            raise OSError("nltk's punkt_tab is not here") from error
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


def _kept(name: str) -> bool:
    """Whether what a task fetches may be here already; told before lm-eval's slow imports."""
    if needs_nothing(name):
        return True
    if name in _WEB:
        return False
    from datasets.config import HF_DATASETS_CACHE

    return (Path(HF_DATASETS_CACHE) / "baber___paul_graham_essays").is_dir()


@contextmanager
def _nltk(offline: bool) -> Iterator[None]:
    """nltk, which must not fetch a thing while ``offline``."""
    try:
        nltk: Any = import_module("nltk")
    except ImportError:
        yield
        return
    fetch = nltk.download
    if offline:
        nltk.download = lambda *args, **kwargs: False
    try:
        yield
    finally:
        nltk.download = fetch


def check_lengths(name: str, tokenizer: str, lengths: Sequence[int]) -> None:
    """Refuse lengths that lm-eval would try to meet without end (UserError)."""
    if name not in (*_LEAST, "ruler_fwe"):
        return
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    tokens = _Counter(get_tokenizer(tokenizer))
    for length in lengths:
        least = round(_SLACK * _least(name, tokens, length))
        if length < least:
            raise UserError(
                f"prompts of {length} tokens are too short, with this tokenizer it needs {least}; "
                "give longer --lengths"
            )


class _Counter:
    """Tokens in a text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> int:
        return len(self.tokenizer(text).input_ids)


def _least(name: str, tokens: _Counter, length: int) -> float:
    """Tokens of the smallest prompt that lm-eval makes, with room for its answer."""
    if name == "ruler_fwe":
        from lm_eval.tasks.ruler import fwe_utils

        return max(200, 2 * tokens(fwe_utils.TEMPLATE))  # at least four words, 50 tokens for each
    step, answer = _LEAST[name]
    if name == "ruler_cwe":
        from lm_eval.tasks.ruler import cwe_utils

        example, text, words = cwe_utils.generate_input_output(step, length)
        numbered = " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))
        return tokens(f"{example}\n{text} {numbered}") + answer
    from lm_eval.tasks.ruler import vt_utils

    example, _ = vt_utils.generate_input_output(step // 2, 1, 4, is_icl=True)
    if _SLACK * (tokens(example) + answer) > _OWN_EXAMPLE:
        raise UserError(
            f"this tokenizer makes {tokens(example)} tokens of the solved example that "
            f"lm-eval fits into {_OWN_EXAMPLE - answer}; use variable-tracking"
        )
    text, variables = vt_utils.generate_input_output(step, 1, 4)
    return _OWN_EXAMPLE + tokens(f"{text} {variables}") + answer


def mix_lengths(task: Any) -> None:
    """Have rows of all lengths take turns, so that the first ones are of every length."""
    rows = task.dataset["test"]
    index = rows["index"]
    task.dataset["test"] = rows.select(sorted(range(len(rows)), key=lambda i: index[i]))
