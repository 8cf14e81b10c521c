"""Functions on memory at fixed addresses that CUDA replays as a graph; they run as usual where that is not possible."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)


class ReplayedCall:
    """
    A function that is called repeatedly, on CUDA by replaying a graph of its operations.

    The function takes and returns nothing: it reads and writes tensors at fixed addresses, never synchronises with the
    device, and allocates the same memory every time. The first call runs it, the second captures it, and all others replay
    the graph. On a CPU, or where capturing fails, every call runs the function.

    Args:
        function (`Callable`): the function.
        device (`torch.device`): device of its tensors.
        pool (*optional*): a `torch.cuda.graph_pool_handle()`, shared with calls that never run at the same time.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.cuda_graphs_autogaze import ReplayedCall

    >>> count = torch.zeros(())
    >>> step = ReplayedCall(lambda: count.add_(1), count.device)
    >>> step(), step(), count.item()
    (None, None, 2.0)

    ```
    """

    def __init__(self, function: Callable[[], object], device: torch.device, pool: Any = None):
        self.function, self.pool = function, pool
        self.can_capture = device.type == "cuda"
        self.has_run = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is None and self.has_run and self.can_capture:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.function()
            self.has_run = True

    def _capture(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may decode and upload frames meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.function()
        except RuntimeError as error:
            self.can_capture = False
            logger.warning_once(f"Gazing runs without CUDA graphs, more slowly: {error}")
        else:
            self.graph = graph
