"""The page as a Space of the Hub; `autogaze app` serves the same."""

from transformers_autogaze.app import launch


launch()
