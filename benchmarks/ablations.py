"""What of a learned rotation matters: `python benchmarks/ablations.py --help`, code in rotation_ablations/."""

if __name__ == "__main__":
    from benchmarks.rotation_ablations.cli import app

    app()
