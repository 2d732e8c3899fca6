"""Perplexity by tokens of training: `python benchmarks/ladder.py --help`, code in training_ladder/."""

if __name__ == "__main__":
    from benchmarks.training_ladder.cli import app

    app()
