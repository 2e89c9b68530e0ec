"""fastlstm: the LSTM, done once and well.

NumPy users need only this module; `fastlstm.nn` holds the drop-ins for `torch.nn.LSTM` and
`torch.nn.LSTMCell`. Importing `fastlstm` never imports torch.
"""

from ._config import get_num_threads, set_num_threads, show_config
from ._core import __version__
from ._layer import LayerGradients, LayerTape, lstm_backward, lstm_forward
from ._lstm import LSTM, Gradients, Tape

__all__ = [
    "LSTM",
    "Gradients",
    "LayerGradients",
    "LayerTape",
    "Tape",
    "__version__",
    "get_num_threads",
    "lstm_backward",
    "lstm_forward",
    "set_num_threads",
    "show_config",
]
