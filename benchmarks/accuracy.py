"""Accuracy of a model at a few bits by method: `python benchmarks/accuracy.py --help`, code in accuracy_table/."""

if __name__ == "__main__":
    from benchmarks.accuracy_table.cli import app

    app()
