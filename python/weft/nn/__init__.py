"""weft's layers: torch.nn's classes with weft's kernels behind them.

Each class that torch has too subclasses torch's of the same name and overrides `forward` alone, so
parameters, `state_dict`, hooks and `isinstance` are torch's.
"""

from weft.nn.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    LazyConv1d,
    LazyConv2d,
    LazyConv3d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
    LazyConvTranspose3d,
)
from weft.nn.conv_block import ConvBlock1d, ConvBlock2d, ConvBlock3d
from weft.nn.mdlstm import MDLSTM2d
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
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBlock1d",
    "ConvBlock2d",
    "ConvBlock3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "GRUCell",
    "LSTMCell",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
    "MDLSTM2d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "Maxout",
    "RNNCell",
    "RoIPool",
    "SpatialPyramidPool2d",
    "WeightedAvgPool2d",
]
