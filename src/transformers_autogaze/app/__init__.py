"""
A web page that prunes a visitor's video and shows what was kept: `autogaze app`, or a Space of the Hub.

[`launch`] serves it. The pieces know one thing each: `page` what visitors see, `choices` and `limits` what they may ask for, `jobs`
how it runs, `work` what is done, `uploads` and `guard` whose files are whose, `reports` and `mllm_tokens` what is told.
"""

from .launching import launch


__all__ = ["launch"]
