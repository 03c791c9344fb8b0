"""weft's layers: torch.nn's classes with weft's kernels behind them.

Each class that torch has too subclasses torch's of the same name and overrides `forward` alone, so
parameters, `state_dict`, hooks and `isinstance` are torch's.
"""

from weft.nn.conv import Conv2d
from weft.nn.pool import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    ChannelPool,
    Maxout,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    WeightedAvgPool2d,
)
from weft.nn.region import RoIPool, SpatialPyramidPool2d
from weft.nn.rnn import GRUCell, LSTMCell, RNNCell
from weft.nn.rnn_layer import GRU, LSTM, RNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "ChannelPool",
    "Conv2d",
    "GRUCell",
    "LSTMCell",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "Maxout",
    "RNNCell",
    "RoIPool",
    "SpatialPyramidPool2d",
    "WeightedAvgPool2d",
]
