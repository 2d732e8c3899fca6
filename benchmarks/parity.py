"""Perplexity of a checkpoint in vLLM and transformers: `python benchmarks/parity.py --help`, code in vllm_serving/."""

if __name__ == "__main__":
    from benchmarks.vllm_serving.parity import app

    app()
