"""Baselines from other papers: what each adds to the decompositions and ranks that all share.

A method is its defaults in a recipe (``method: palu``) plus one module here for what is its own:

- ``uniform``: plain SVD of the weights, the same share of every full rank. Nothing of its own.
- ``palu`` (arXiv 2407.21118): ranks by Fisher scores.
- ``recalkv`` (arXiv 2505.24357): key heads in groups of the like; values calibrated.
- ``eigen`` (arXiv 2408.05646): keys in the eigenbasis of keys and queries; one error in all layers.
- ``care`` (arXiv 2603.17946): covariance-aware factors, greedy ranks.

All of them are one-shot and meet the budget in stored bytes as every other method does: ranks go by
row steps (docs/design.md section 4), where the papers round to 32 or not at all.
"""
