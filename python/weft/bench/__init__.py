"""Measuring weft against PyTorch.

- `rows`: what is measured, as data.
- `measure`: how; the one timing helper.
- `report`: table, JSON and plot.
"""
