"""What matters in end-to-end training: `python benchmarks/training.py --help`, code in training_ablations/."""

if __name__ == "__main__":
    from benchmarks.training_ablations.cli import app

    app()
