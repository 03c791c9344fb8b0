"""weft's functions; those that torch has too have its names and signatures."""

from weft.conv import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from weft.mdlstm import mdlstm2d
from weft.pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    channel_pool,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    weighted_avg_pool2d,
)
from weft.region import roi_pool, spatial_pyramid_pool2d
from weft.rnn import gru_cell, lstm_cell, rnn_cell

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "channel_pool",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "gru_cell",
    "lstm_cell",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "mdlstm2d",
    "rnn_cell",
    "roi_pool",
    "spatial_pyramid_pool2d",
    "weighted_avg_pool2d",
]
