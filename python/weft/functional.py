"""weft's functions, with the signatures of `torch.nn.functional` and `torch`."""

from weft.conv import conv2d
from weft.pool import avg_pool2d, max_pool2d
from weft.rnn import gru_cell, lstm_cell, rnn_cell

__all__ = ["avg_pool2d", "conv2d", "gru_cell", "lstm_cell", "max_pool2d", "rnn_cell"]
