"""What is asked of a model: files of prompts, built-in and mock requests, and batches of them, padded on the left."""
