"""From a Hugging Face causal LM to a butterfly checkpoint: calibration, evaluation and analysis. Never imports vLLM."""
