"""From text, chats and generated problems to packed batches of tokens (arXiv 2605.05365).

tokenizer -> messages, chat (rendering, loss mask) -> trim (AP trimming) -> sources, problem_sources ->
mixture -> packing. ``aggregation`` holds the tails and prompts of test-time compute.
"""
