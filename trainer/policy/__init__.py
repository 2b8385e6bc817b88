"""GRPO: a model answers problems in groups, and its tokens become likelier as far as an answer beats its group."""
