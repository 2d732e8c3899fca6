"""Tokens per second of a running vLLM: `python benchmarks/serving.py --help`, code in vllm_serving/."""

if __name__ == "__main__":
    from benchmarks.vllm_serving.cli import app

    app()
