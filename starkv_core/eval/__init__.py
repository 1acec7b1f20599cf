"""Evaluation: perplexity and retrieval on the deployed path, reports and their figures."""
