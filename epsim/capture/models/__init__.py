"""Models to trace: checkpoints and random weights (`load.load_model`), and what encodes their prompts (`processor`)."""
