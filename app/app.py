"""The page as a Space of the Hub; `autogaze app` serves the same page."""

from transformers_autogaze.app import launch


launch()
