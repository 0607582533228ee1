"""Experiments that compare many training runs: what they leave as plain values, a document and its figures."""
