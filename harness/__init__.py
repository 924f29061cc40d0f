"""Composes editors, merging and routing into ablation grids, measures them and keeps the results."""
