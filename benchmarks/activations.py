"""Perplexity with 8-bit activations: `python benchmarks/activations.py --help`, code in activation_rounding/."""

if __name__ == "__main__":
    from benchmarks.activation_rounding.cli import app

    app()
