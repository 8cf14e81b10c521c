"""
A web page that prunes uploaded videos and shows the kept patches: `autogaze app`, or a Space of the Hub.

[`launch`] serves it. `page` has the components and their event handlers, `choices` and `limits` the settings and their bounds,
`jobs` a queue of background jobs, `work` the pruning itself, `uploads` and `guard` the files and who may access them, `reports` the
results as HTML, and `mllm_tokens` the token counts of MLLMs.
"""

from .launching import launch


__all__ = ["launch"]
